# SPDX-License-Identifier: Apache-2.0
"""The judges of `vhost-airlock attack`: what is weak does not pass."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import weak
from vhost_airlock.attack import back_judge, front_judge
from vhost_airlock.attack.catalogue import Attack, Outcome, Verdict, select
from vhost_airlock.attack.guest_scene import GuestScene
from vhost_airlock.attack.program import Program
from vhost_airlock.attack.report import Report
from vhost_airlock.attack.vmm import VmmScene
from vhost_airlock.cli import main as cli
from vhost_airlock.cli.attack import BACK, GROUPS, GUEST, VMM
from vhost_airlock.errors import UsageError

TIMEOUT = 20.0


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


@pytest.fixture
def quiet() -> Iterator[int]:
    fd = os.open(os.devnull, os.O_WRONLY)
    yield fd
    os.close(fd)


def attacked(flaw: str, path: str, log: int, name: str, timeout: float) -> Outcome:
    """A guest's attack on a back-end with a flaw."""
    command = [sys.executable, weak.__file__, flaw, path]
    with Program(path, command, TIMEOUT, log) as program:
        program.ensure()
        program.timeout = timeout
        (outcome,) = front_judge.run(program, select(GUEST, [name]), GuestScene)
    return outcome


@pytest.mark.parametrize(
    ("flaw", "timeout", "verdict", "why"),
    [
        ("none", TIMEOUT, Verdict.RING_STOPPED, ""),
        ("exits", TIMEOUT, Verdict.PROCESS_GONE, "exit status 3"),
        ("freezes", 1.0, Verdict.HANGS, "a new connection"),
        ("hangs-up", TIMEOUT, Verdict.CONNECTION_LOST, "closed the connection"),
        ("breaks-for-good", 1.0, Verdict.RING_LOST, "set up anew"),
    ],
)
def test_each_way_to_fail_is_seen(path, quiet, flaw, timeout, verdict, why):
    outcome = attacked(flaw, path, quiet, "head-beyond", timeout)
    assert (outcome.verdict, outcome.held) == (verdict, flaw == "none")
    assert why in outcome.why


def test_program_that_ended_is_started_for_the_next_attack(path, quiet):
    command = [sys.executable, weak.__file__, "exits", path]
    with Program(path, command, TIMEOUT, quiet) as program:
        chosen = select(GUEST, ["head-beyond", "zero-length"])
        outcomes = front_judge.run(program, chosen, GuestScene)
        verdicts = {each.attack.name: each.verdict for each in outcomes}
    assert verdicts == {
        "head-beyond": Verdict.PROCESS_GONE,
        "zero-length": Verdict.HELD,
    }


def test_nobody_to_attack_is_not_a_success(path, quiet):
    program = Program(path, (), TIMEOUT, quiet)
    (outcome,) = front_judge.run(program, select(VMM, ["noise"]), VmmScene)
    assert outcome.verdict is Verdict.NOT_RUN
    assert not outcome.held


@pytest.mark.parametrize("name", ["scribbles", "writes-after-stop"])
def test_harm_to_guest_memory_is_seen(path, quiet, name):
    """There is nothing between the guest and the hostile back-end."""
    program = Program(path, (), TIMEOUT, quiet)
    (outcome,) = back_judge.run(program, select(BACK, [name]), path)
    assert (outcome.verdict, outcome.held) == (Verdict.GUEST_HARMED, False)


def test_report_says_who_did_not_hold():
    def nothing(scene: object) -> None: ...

    good, bad = Attack("good", "", nothing), Attack("bad", "", nothing)
    out = io.StringIO()
    report = Report([good, bad], out)
    report.add(Outcome(good, Verdict.RING_STOPPED))
    assert report.held
    report.add(Outcome(bad, Verdict.PROCESS_GONE, "killed by SIGABRT"))
    report.conclude()
    assert not report.held
    assert [each["held"] for each in report.as_dict()["attacks"]] == [True, False]
    assert "killed by SIGABRT" in out.getvalue()
    assert "1 of 2 attacks held\nprocess gone: bad\n" in out.getvalue()


def test_nothing_at_all_has_not_held():
    assert not Report([], None).held


def test_attacks_are_chosen_by_pattern():
    assert [each.name for each in select(GUEST, ["table-e*", "index-jump"])] == [
        "index-jump",
        "table-empty",
    ]
    assert select(GUEST, []) == GUEST
    with pytest.raises(UsageError):
        select(GUEST, ["index-jump", "nonsense"])


def test_names_are_unique_within_their_group():
    for _, attacks in GROUPS:
        names = [each.name for each in attacks]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--as-guest=a", "--as-vmm=b"],
        ["--as-backend=a"],
        ["--as-guest=a", "--front=b"],
        ["--as-guest=a", "nonsense"],
    ],
)
def test_arguments_that_make_no_sense(arguments, capsys):
    assert cli.main(["attack", *arguments]) == 2
    assert capsys.readouterr().err.startswith("vhost-airlock: ")


def test_list_has_every_attack(capsys):
    assert cli.main(["attack", "--list"]) == 0
    said = capsys.readouterr().out
    for title, attacks in GROUPS:
        assert f"{title}:\n" in said
        for attack in attacks:
            assert f"  {attack.name} " in said
            assert attack.what in said
