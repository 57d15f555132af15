# SPDX-License-Identifier: Apache-2.0
"""All of `vhost-airlock attack` against the airlock: every attack holds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support import weak
from tests.support.backs import wait_until
from tests.support.program import UNBOXED
from vhost_airlock.attack.program import listens
from vhost_airlock.cli.attack import GROUPS
from vhost_airlock.peers.blk_process import BlkProcess

PYTHON = sys.executable
AIRLOCK = [PYTHON, "-m", "vhost_airlock", "run", "--drain-timeout=0.3", *UNBOXED]
ATTACK = [PYTHON, "-m", "vhost_airlock", "attack", "--json", "--timeout=20"]
PATIENCE = 110.0

Result = dict[str, Any]


class Attack:
    """The command, which runs."""

    def __init__(self, out: Path, *arguments: str) -> None:
        self._out, self._log = out, out.with_suffix(".log")
        command = [*ATTACK, f"--log={self._log}", *arguments]
        with out.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file)

    def result(self) -> Result:
        status = self.process.wait(PATIENCE)
        found: Result = json.loads(self._out.read_text())
        assert status == (0 if found["held"] else 1)
        return found

    def said(self) -> str:
        """The end of the log of the program that is attacked."""
        return self._log.read_text(errors="replace")[-20_000:]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def verdicts(found: Result) -> dict[str, str]:
    return {each["name"]: each["verdict"] for each in found["attacks"]}


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Attack]]:
    """All groups at once: most of their time is waiting."""
    folder = tmp_path_factory.mktemp("a")
    disk = folder / "disk"
    disk.write_bytes(bytes(4 << 20))
    with ExitStack() as stack:
        running = {}
        for title, _ in GROUPS:
            front, back = folder / f"{title}.front", folder / f"{title}.back"
            airlock = [*AIRLOCK, f"--socket-path={front}", f"--backend={back}"]
            if title == "--as-backend":
                airlock.append("--timeout=1")
                arguments = [f"{title}={back}", f"--front={front}"]
            else:
                stack.enter_context(BlkProcess(str(disk), str(back), num_queues=2))
                arguments = [f"{title}={front}"]
            out = folder / f"{title}.json"
            running[title] = Attack(out, *arguments, "--", *airlock)
            stack.callback(running[title].close)
        yield running


@pytest.mark.parametrize("title", [title for title, _ in GROUPS])
def test_the_airlock_holds(running: dict[str, Attack], title: str):
    found = running[title].result()
    lost = [each for each in found["attacks"] if not each["held"]]
    assert not lost, f"{json.dumps(lost)}\n{running[title].said()}"
    names = [each.name for each in dict(GROUPS)[title]]
    assert [each["name"] for each in found["attacks"]] == names


def test_flaw_that_a_race_finds_is_out_of_reach_behind_the_airlock(tmp_path: Path):
    """The back-end reads a next twice. Directly, it is gone; here, it never ends."""
    back, front = tmp_path / "back", tmp_path / "front"
    flawed = [PYTHON, weak.__file__, "double-fetch", str(back)]
    names = ("race-table-next", "race-next")
    direct = Attack(tmp_path / "direct", f"--as-guest={back}", *names, "--", *flawed)
    assert verdicts(direct.result()) == dict.fromkeys(reversed(names), "process gone")
    with subprocess.Popen(flawed) as process:
        try:
            while not listens(str(back)):
                assert process.poll() is None
            airlock = [*AIRLOCK, f"--socket-path={front}", f"--backend={back}"]
            behind = Attack(
                tmp_path / "behind", f"--as-guest={front}", *names, "--", *airlock
            )
            assert behind.result()["held"]
            assert process.poll() is None
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_program_that_it_started_ends_with_it(tmp_path: Path, number: signal.Signals):
    back, front, disk = (tmp_path / name for name in ("back", "front", "disk"))
    disk.write_bytes(bytes(4 << 20))
    airlock = [*AIRLOCK, f"--socket-path={front}", f"--backend={back}"]
    with BlkProcess(str(disk), str(back)):
        attack = Attack(tmp_path / "out", f"--as-guest={front}", "--", *airlock)
        wait_until(lambda: listens(str(front)), "the airlock listens")
        attack.process.send_signal(number)
        assert attack.process.wait(PATIENCE) == 128 + number
    assert not listens(str(front))
