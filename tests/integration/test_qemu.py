# SPDX-License-Identifier: Apache-2.0
"""`vhost-airlock qemu` with a program that stands in for QEMU: what that gets.

The real QEMU is in tests/real/test_qemu.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.airlocks import Airlocks
from tests.support.backs import PATIENCE, DiskBack, readable
from tests.support.program import listening
from vhost_airlock.cli.stats_document import ask_all
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.vhost.fds import Fd

COMMAND = (sys.executable, "-m", "vhost_airlock", "qemu")
MEMORY = ("-object", "memory-backend-memfd,id=ram", "-M", "q35,memory-backend=ram")

STAND_IN = """
import json, os, sys
fds = {}
for fd in os.listdir("/proc/self/fd"):
    try:
        fds[fd] = os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        pass  # that of the folder itself
lines = open("/proc/self/status").read().splitlines()
process = f"/proc/self/task/{os.getpid()}"
print(json.dumps({
    "process": os.getpid(),
    "words": sys.argv[1:],
    "descriptors": {fd: name.partition(":")[0] for fd, name in fds.items()},
    "environment": open("/proc/self/environ", errors="surrogateescape").read(),
    "folder": os.getcwd(),
    "ids": [os.getppid(), os.getpgid(0), os.getsid(0)],
    "children": open(f"{process}/children").read(),
    "state": [line for line in lines if line[:4] in ("SigB", "SigI", "Umas")],
}), flush=True)
os.close(1)
sys.stdin.read()
"""
"""Tells all about its process, closes its stdout, and stays until its stdin ends."""


class Qemu:
    """The stand-in, started by the command that is given. `told` is what it told."""

    def __init__(
        self,
        folder: Path,
        by: Sequence[str],
        words: Sequence[str],
        code: str = "",
        **options: Any,
    ) -> None:
        options.setdefault("env", {**os.environ, "TMPDIR": str(folder)})
        with (folder / "errors").open("ab") as errors:
            self.process = subprocess.Popen(
                [*by, sys.executable, "-c", code + STAND_IN, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                **options,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, (folder / "errors").read_text()
        self.told = json.loads(line)

    def socket(self) -> str:
        """Where the chardev in its words leads."""
        path: str = self.told["words"][-1].rpartition("path=")[2]
        return path

    def end(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(PATIENCE) == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[list[str]]:
    """QEMU's options for a disk whose back-end is there."""
    path = tmp_path / "back.sock"
    chardev = ["-chardev", f"socket,id=disk,path={path}"]
    with listening(DiskBack(), path):
        yield [*MEMORY, "-device", "vhost-user-blk-pci,chardev=disk", *chardev]


@contextlib.contextmanager
def started(
    folder: Path, words: Sequence[str], *options: str, code: str = "", **others: Any
) -> Iterator[Qemu]:
    """A stand-in with airlocks, which have to end with it and leave nothing behind."""
    airlocks = Airlocks(folder)
    by = [*COMMAND, *options, "--"]
    qemu = Qemu(folder, by, words, code, start_new_session=True, **others)
    keeper = airlocks.keeper()
    yield qemu
    qemu.end()
    airlocks.assert_end(keeper)


def read(path: str) -> None:
    """Read the disk, as QEMU's guest does."""
    with BlkGuest() as guest:
        guest.connect(path)
        guest.start()
        guest.read(0, [(guest.ram.alloc(512), 512)])
        guest.stop()


def test_qemu_gets_all_that_the_command_has(tmp_path: Path, disk: list[str]) -> None:
    """Without airlocks there is no difference to a QEMU that was started directly;
    with one, the path of a socket and a pipe."""
    given = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "A": "b=\udcff"}
    given["PYTHONPATH"] = os.pathsep.join(sys.path)
    with Fd(os.open("/dev/zero", os.O_RDONLY)) as fd:
        fds = [fd.fileno()]
        direct, plain, isolated = (
            Qemu(tmp_path, by, words, env=given, pass_fds=fds)
            for by, words in (
                ([], ["--version"]),
                ([*COMMAND, "--"], ["--version"]),
                ([*COMMAND, "--"], disk),
            )
        )
        keeper = Airlocks(tmp_path).keeper()
        for qemu in (direct, plain, isolated):
            assert qemu.told.pop("process") == qemu.process.pid
            qemu.end()
        Airlocks(tmp_path).assert_end(keeper)
    assert plain.told == direct.told
    words, path = isolated.told["words"], isolated.socket()
    assert words == [*disk[:-1], f"backend=socket,id=disk,path={path}"]
    isolated.told["words"] = direct.told["words"]
    added = isolated.told["descriptors"].items() - direct.told["descriptors"].items()
    assert [kind for _, kind in added] == ["pipe"]
    for number, _ in added:
        del isolated.told["descriptors"][number]
    assert isolated.told == direct.told


def test_qemu_dies_of_signals_that_python_ignores() -> None:
    die = "kill -s PIPE $$; echo it goes on"
    done = subprocess.run([*COMMAND, "--", "sh", "-c", die], capture_output=True)
    assert (done.returncode, done.stdout) == (-signal.SIGPIPE, b"")


def test_airlock_holds_nothing_of_qemus(tmp_path: Path, disk: list[str]) -> None:
    """What QEMU closes is closed: its stdout, and a descriptor that it has inherited.

    The private folder is for one user alone, and the airlock's log in its own file.
    """
    log = tmp_path / "log"
    options = ("--log-level=info", f"--log-file={log}", f"--stats-dir={tmp_path}")
    reading, writing = map(Fd, os.pipe())
    theirs = writing.fileno()
    code = f"import os; os.close({theirs})\n"
    with started(tmp_path, disk, *options, code=code, pass_fds=[theirs]) as qemu:
        assert qemu.process.stdout is not None
        assert qemu.process.stdout.read() == b""  # STAND_IN has closed it
        writing.close()
        with reading:
            assert os.read(reading.fileno(), 1) == b""
        (private,) = Airlocks(tmp_path).private()
        assert private.stat().st_mode & 0o777 == 0o700
        assert Path(qemu.socket()).parent == private
        assert Path(qemu.socket()).stat().st_mode & 0o777 == 0o600
        read(qemu.socket())
        (answer,), _ = ask_all([str(tmp_path)])
        assert (answer.document.name, answer.document.sessions) == ("disk", 1)
    end = "vhost-airlock disk: info: the pipe has no other end any more: ending\n"
    assert end in log.read_text()
    assert (tmp_path / "errors").read_text() == ""


def test_back_end_is_swapped_at_the_control_socket_in_a_folder(
    tmp_path: Path, disk: list[str]
) -> None:
    """The folder is that of stats too, where each airlock is shown once."""
    options = (f"--control-dir={tmp_path}", f"--stats-dir={tmp_path}")
    control, there = tmp_path / "disk.control", tmp_path / "other.sock"
    with started(tmp_path, disk, *options) as qemu, listening(DiskBack(), there) as at:
        read(qemu.socket())
        assert control.stat().st_mode & 0o777 == 0o600
        swap = (*COMMAND[:-1], "swap", str(control), f"--backend={at}")
        done = subprocess.run(swap, capture_output=True, text=True, check=True)
        assert done.stdout == "the next VMM gets the new back-end\n"
        read(qemu.socket())
        (answer,), _ = ask_all([str(tmp_path)])
        assert answer.document.sessions == 2
    assert not control.exists()


def test_inherited_socket_of_a_back_end_is_the_airlocks(tmp_path: Path) -> None:
    """QEMU has it no more, so that the back-end sees the airlock's end."""
    ours, theirs = socket.socketpair()
    fd = theirs.fileno()
    words = [*MEMORY, "-device", "vhost-user-blk-pci,chardev=disk"]
    words += ["-chardev", f"socket,id=disk,fd={fd}"]
    with contextlib.closing(DiskBack()) as back, contextlib.ExitStack() as stack:
        back.start(ours)
        with theirs:
            scene = started(tmp_path, words, f"--stats-dir={tmp_path}", pass_fds=[fd])
            qemu = stack.enter_context(scene)
        assert "socket" not in qemu.told["descriptors"].values()
        read(qemu.socket())
        back.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_signals_of_a_terminal_are_for_qemu_alone(
    tmp_path: Path, disk: list[str], number: signal.Signals
) -> None:
    """They go to its process group; QEMU may still use its devices."""
    code = f"import signal; signal.signal({number}, lambda *_: None)\n"
    with started(tmp_path, disk, code=code) as qemu:
        os.killpg(qemu.process.pid, number)
        read(qemu.socket())


def test_airlock_goes_on_without_the_keeper(tmp_path: Path, disk: list[str]) -> None:
    """And ends with QEMU all the same."""
    airlocks = Airlocks(tmp_path)
    qemu = Qemu(tmp_path, [*COMMAND, "--"], disk)
    keeper = Fd(airlocks.keeper())
    (pid,) = airlocks.pids().values()
    with keeper, Fd(os.pidfd_open(pid)) as airlock:
        signal.pidfd_send_signal(keeper.fileno(), signal.SIGTERM)
        read(qemu.socket())
        signal.pidfd_send_signal(keeper.fileno(), signal.SIGKILL)
        assert readable(keeper, PATIENCE)
        read(qemu.socket())
        assert not readable(airlock, 0)
        qemu.end()
        assert readable(airlock, PATIENCE)


@pytest.mark.parametrize(
    ("program", "status", "reason"),
    [
        ("/no/qemu", 127, "No such file or directory"),
        ("no-such-qemu", 127, "No such file or directory"),
        ("/etc/passwd", 126, "Permission denied"),
    ],
)
def test_program_that_can_not_be_run(
    tmp_path: Path, disk: list[str], program: str, status: int, reason: str
) -> None:
    """The status is a shell's, and what was started ends."""
    done = subprocess.run(
        [*COMMAND, "--", program, *disk],
        capture_output=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        timeout=PATIENCE,
    )
    assert done.returncode == status
    assert done.stderr.decode() == f"vhost-airlock: can't run {program}: {reason}\n"
    assert done.stdout == b""
    # All that was started has ended, since nobody else holds the stderr any more.
    assert Airlocks(tmp_path).pids() == {}
    assert Airlocks(tmp_path).private() == []
