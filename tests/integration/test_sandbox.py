# SPDX-License-Identifier: Apache-2.0
"""An airlock that runs locked in, as other processes and the kernel see it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.backs import ScriptedBack, wait_until
from tests.support.program import Program
from tests.support.sessions import serve, small_guest
from vhost_airlock.peers.guest import BlkGuest

BLK = (sys.executable, "-m", "vhost_airlock.peers.blk")
SOMEBODY = 65534
"""Whom root becomes where only an ordinary user will do."""


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (s.partition(":") for s in lines)}


def children(pid: int) -> list[int]:
    return [
        int(word)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for word in task.joinpath("children").read_text().split()
    ]


def limit(pid: int, name: str) -> tuple[int, int]:
    text = Path(f"/proc/{pid}/limits").read_text()
    found = re.search(rf"^Max {name} +(\d+) +(\d+)", text, re.M)
    assert found, text
    return int(found[1]), int(found[2])


def test_every_thread_is_locked_in(
    front: Path, where: Path, back: ScriptedBack
) -> None:
    ways = [f"--socket-path={front}", f"--backend={where}"]
    with (
        Program(*ways, f"--stats-path={front}.stats") as program,
        small_guest() as guest,
    ):
        guest.connect(program.connect(front))
        guest.start()
        serve(back, guest)
        tasks = [int(task.name) for task in Path(f"/proc/{program.pid}/task").iterdir()]
        assert len(tasks) == 3
        for task in tasks:
            assert status(task)["Seccomp"] == "2"
            assert status(task)["NoNewPrivs"] == "1"
        assert limit(program.pid, "core file size") == (0, 0)
        most, hard = limit(program.pid, "open files")
        assert most == hard <= 2048


def test_it_may_be_left_out(front: Path, where: Path) -> None:
    with Program(
        f"--socket-path={front}", f"--backend={where}", "--sandbox=off"
    ) as program:
        program.connect(front).close()
        assert status(program.pid)["Seccomp"] == status(os.getpid())["Seccomp"]
        assert program.stop() == 0


def test_sockets_are_for_their_owner_only(
    front: Path, tmp_path: Path, back: ScriptedBack
) -> None:
    other = tmp_path / "back.sock"
    with Program(f"--socket-path={front}", f"--backend-listen={other}") as program:
        program.connect(front).close()
        wait_until(other.exists, "it listens for the back-end too")
        for path in (front, other):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert program.stop() == 0


def test_what_is_started_is_not_locked_in(front: Path, tmp_path: Path) -> None:
    """It has the airlock's user and limits, and a filter only if we have one too."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    command = [*BLK, "--fd={fd}", f"--blk-file={image}"]
    with Program(f"--socket-path={front}", "--", *command) as program:
        with BlkGuest() as guest:
            guest.connect(program.connect(front))
            guest.start()
            (broker,) = children(program.pid)
            (started,) = children(broker)
            assert status(program.pid)["Seccomp"] == "2"
            for pid in (broker, started):
                for name in ("Seccomp", "NoNewPrivs"):
                    assert status(pid)[name] == status(os.getpid())[name]
                for name in ("core file size", "open files"):
                    assert limit_of(pid, name) == limit_of(os.getpid(), name)
        assert program.stop() == 0
        assert not Path(f"/proc/{broker}").exists()
        assert not Path(f"/proc/{started}").exists()


def limit_of(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"Max {name}")]
    return line


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGHUP])
def test_nothing_is_left_of_an_airlock_that_is_killed(
    front: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """No process, and no socket."""
    stats = tmp_path / "stats.sock"
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    command = [*BLK, "--fd={fd}", f"--blk-file={image}"]
    with (
        Program(
            f"--socket-path={front}", f"--stats-path={stats}", "--", *command
        ) as program,
        BlkGuest() as guest,
    ):
        guest.connect(program.connect(front))
        guest.start()
        (broker,) = children(program.pid)
        (started,) = children(broker)
        program.process.send_signal(number)
        program.wait()
        for pid in (started, broker):
            wait_until(lambda pid=pid: gone(pid), "it has ended")  # type: ignore[misc]
        assert not front.exists()
        assert not stats.exists()


def gone(pid: int) -> bool:
    """The process that inherits an orphan may be slow to wait for it."""
    try:
        return status(pid)["State"].startswith("Z")
    except FileNotFoundError:
        return True


# Other processes of the same user.

BECOME = f"""
import ctypes, os, sys
from vhost_airlock.cli import main as cli, run
cli.parsers(["run"])  # argparse loads modules late, which SOMEBODY may not read
libc = ctypes.CDLL(None, use_errno=True)
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(*3 * [{SOMEBODY}])
    os.setresuid(*3 * [{SOMEBODY}])
    libc.prctl(4, 1)    # as an ordinary process is
"""
RUN = BECOME + "sys.exit(cli.main(['run', *sys.argv[1:]]))"
PRY = (
    BECOME
    + """
pid = int(sys.argv[1])
for name in ("mem", "fd", "maps", "environ"):
    try:
        if name == "fd":
            os.listdir(f"/proc/{pid}/fd")
        else:
            open(f"/proc/{pid}/{name}", "rb").close()
        print("opens", name)
    except PermissionError:
        pass
if libc.ptrace(16, pid, 0, 0) == 0:
    os.waitpid(pid, 0)
    libc.ptrace(17, pid, 0, 0)
    print("attaches")
word = ctypes.c_uint64()
class Part(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
ours = Part(ctypes.addressof(word), 8)
theirs = Part(int(sys.argv[2], 16), 8)
if libc.process_vm_readv(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0) == 8:
    print("reads")
"""
)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder of somebody's."""
    folder = Path(tempfile.mkdtemp(prefix="airlock-"))
    if os.geteuid() == 0:
        os.chown(folder, SOMEBODY, SOMEBODY)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("sandbox", ["on", "off"])
def test_processes_of_the_same_user_can_not_look_into_it(
    shared: Path, sandbox: str
) -> None:
    """They could without: this is the sandbox's doing."""
    ways = [f"--front-connect={shared}/front", f"--backend-listen={shared}/back"]
    run = (sys.executable, "-c", RUN)
    with Program(*ways, f"--sandbox={sandbox}", command=run) as program:
        wait_until(lambda: (shared / "back").exists(), "it listens")
        wait_until(
            lambda: sandbox == "off" or status(program.pid)["Seccomp"] == "2",
            "it has locked itself in",
        )
        done = subprocess.run(
            [sys.executable, "-c", PRY, str(program.pid), mapped(program.pid)],
            capture_output=True,
            check=True,
            text=True,
        )
        ways_in = ["opens mem", "opens fd", "opens maps", "opens environ"]
        ways_in += ["attaches", "reads"]
        assert done.stdout.splitlines() == ([] if sandbox == "on" else ways_in)
        assert program.stop() == 0


def mapped(pid: int) -> str:
    """An address that the process has mapped; root may look it up."""
    try:
        return Path(f"/proc/{pid}/maps").read_text().partition("-")[0]
    except PermissionError:
        return "1000"
