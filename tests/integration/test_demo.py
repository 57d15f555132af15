# SPDX-License-Identifier: Apache-2.0
"""The demo, as a user starts it: what it shows, how it can fail, what it leaves."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vhost_airlock.cli import demo
from vhost_airlock.peers.disk import SECTOR
from vhost_airlock.peers.ram import MIB
from vhost_airlock.peers.scan import search
from vhost_airlock.peers.workload import Stage, Workload

DEMO = [sys.executable, "-m", "vhost_airlock", "demo"]
FIRST_LINE = "A guest writes a disk"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """For the demo's temporary files; empty again at the end."""
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(folder)}


SMALL = (Stage(65536, 4, MIB), Stage(MIB, 2, 4 * MIB))
"""Less to write than the demo has by itself, which one test here does."""
SMALL_DEMO = [
    sys.executable,
    "-c",
    "import argparse; from vhost_airlock.cli import demo;"
    f"from vhost_airlock.peers.workload import Stage; demo.STAGES = {SMALL!r};"
    "raise SystemExit(demo.run(argparse.Namespace(json=False)))",
]


def run_small(monkeypatch: pytest.MonkeyPatch, folder: Path, *, json: bool) -> int:
    """Run it in this process."""
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setattr(demo, "STAGES", SMALL)
    return demo.run(argparse.Namespace(json=json))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Its JSON, when all is well."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [*DEMO, "--json"], env=environment(folder), capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert list(folder.iterdir()) == []
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_it_works(report: dict[str, Any]) -> None:
    assert report["ok"]
    assert report["error"] is None
    for direction in ("written", "read"):
        assert report[direction]["bytes"] >= 256 * MIB
        assert len({stage["size"] for stage in report[direction]["stages"]}) > 3
        assert len({stage["depth"] for stage in report[direction]["stages"]}) > 3
    requests = report["written"]["requests"] + report["read"]["requests"]
    rings = [report["counters"][f"ring {i}"] for i in range(demo.QUEUES)]
    # A flush, and the block with the marker.
    assert sum(ring["completions"] for ring in rings) == requests + 2


def test_the_proof_is_one(report: dict[str, Any]) -> None:
    proof = report["proof"]
    assert len(proof["direct"]["guest_memory_marker"]) == proof["planted"] == 2
    assert all("guest-ram" in at for at in proof["direct"]["guest_memory_marker"])
    assert proof["airlock"]["guest_memory_marker"] == []
    assert proof["airlock"]["written_marker"]
    # The disk alone is more than that, and it's searched in both cases.
    assert proof["airlock"]["searched_bytes"] > 256 * MIB
    holds = "\n".join(proof["back_end_holds"])
    assert "guest-ram" not in holds
    assert re.search("fd .* memfd:vhost-airlock", holds)
    assert re.search("mapping .* memfd:vhost-airlock", holds)


def test_people_get_plain_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_small(monkeypatch, folder, json=False) == 0
    out, errors = capsys.readouterr()
    assert errors == ""
    assert not {"\r", "\x1b"} & set(out)
    assert "connected directly: YES, found 2 times" in out
    assert "through the airlock: no, not found" in out
    assert "memfd:vhost-airlock-pool" in out
    assert out.splitlines()[-1].startswith("PASSED")


def test_people_see_progress_on_a_terminal(folder: Path) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        with subprocess.Popen(
            SMALL_DEMO, env=environment(folder), stdout=theirs
        ) as process:
            os.close(theirs)
            shown = b""
            # An error is how a pty says that nobody has its other end any more.
            with contextlib.suppress(OSError):
                while piece := terminal.read(4096):
                    shown += piece
        assert process.returncode == 0
    # How far it is when it tells depends on the machine.
    assert re.search(rb"\r  \[#*\.*\] \d+ of \d+ MiB", shown)
    assert b"PASSED" in shown


class Spoiled(Workload):
    """Somebody else writes to one sector before all is read."""

    def read(self, stage, progress):
        if stage is self.stages[0]:
            self.guest.write(7, [(self.guest.ram.alloc(SECTOR), SECTOR)])
        return super().read(stage, progress)


def test_wrong_data_fails(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "Workload", Spoiled)
    assert run_small(monkeypatch, folder, json=True) == 1
    out, errors = capsys.readouterr()
    report = json.loads(out)
    assert not report["ok"]
    assert "read at 0x0 than were written" in report["error"]
    assert report["error"] in errors


class NoAirlock(contextlib.nullcontext[None]):
    """Leads to the back-end itself."""

    def __init__(self, backend: str, folder: str) -> None:
        super().__init__()
        self.path = backend
        self.counters: dict[str, dict[str, int]] = {}

    def __enter__(self):
        return self


def test_exposed_memory_fails(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_Airlock", NoAirlock)
    assert run_small(monkeypatch, folder, json=False) == 1
    out = capsys.readouterr().out
    assert "through the airlock: YES, found 2 times" in out
    assert out.splitlines()[-1].startswith("FAILED")


def test_search_that_finds_nothing_at_all_fails(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """It would be no proof."""
    monkeypatch.setattr(demo, "search", lambda pid, markers: search(pid, [b"\1" * 99]))
    assert run_small(monkeypatch, folder, json=True) == 1


def children(pid: int) -> dict[str, int]:
    """The processes that the demo has started, by what they are."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        command = Path(f"/proc/{child}/cmdline").read_bytes()
        found["back" if b"vhost_airlock.peers.blk" in command else "airlock"] = int(
            child
        )
    return found


@pytest.mark.parametrize(
    ("victim", "number", "status"),
    [
        ("demo", signal.SIGTERM, 128 + signal.SIGTERM),
        ("demo", signal.SIGINT, 128 + signal.SIGINT),
        ("back", signal.SIGKILL, 1),
        ("airlock", signal.SIGKILL, 1),
    ],
)
def test_nothing_is_left_when_a_process_ends_early(
    folder: Path, victim: str, number: int, status: int
) -> None:
    with subprocess.Popen(
        DEMO,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(FIRST_LINE)
            started = children(process.pid)
            assert set(started) == {"back", "airlock"}
            os.kill({**started, "demo": process.pid}[victim], number)
            _, errors = process.communicate(timeout=30)
        finally:
            process.terminate()
    assert process.returncode == status
    for pid in started.values():
        assert not Path(f"/proc/{pid}").exists()
    if victim == "demo":
        assert errors == ""
    else:
        assert re.fullmatch("vhost-airlock: demo: .*the airlock ended.*\n", errors)
