# SPDX-License-Identifier: Apache-2.0
"""`run --control-path` and `vhost-airlock swap` as their users have them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.test_activation import passed
from tests.integration.test_process import BLK, children, started
from tests.integration.test_recovery import offer
from tests.support.backs import PATIENCE, DiskBack, ScriptedBack, wait_until
from tests.support.program import LINE, Program, connect, listening
from tests.support.sessions import await_reaped, lose, serve, small_guest
from vhost_airlock.cli import stats_document
from vhost_airlock.cli.stats_document import ask, parse
from vhost_airlock.peers.blk_process import BlkProcess
from vhost_airlock.peers.disk import SECTOR
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.process.control import KIND
from vhost_airlock.vhost.fds import Fd
from vhost_airlock.vhost.wire import Payload, Request


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The control socket."""
    return tmp_path / "control.sock"


@pytest.fixture(autouse=True)
def _busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats_document, "PATIENCE", PATIENCE)


@contextmanager
def running(front: Path, path: Path, *ways: str) -> Iterator[Program]:
    """A program that takes its sockets with it."""
    options = (f"--socket-path={front}", f"--control-path={path}", *ways)
    with Program(*options) as program:
        connect(path, program, KIND).close()  # it listens
        yield program
        assert program.stop() == 0
        assert not path.exists()
        assert not front.exists()
        assert "Traceback" not in program.everything()


def swapped(path: Path, *words: str | Path) -> str:
    """The result of `vhost-airlock swap`, or, if it fails, the reason."""
    command = (sys.executable, "-m", "vhost_airlock", "swap", str(path))
    done = subprocess.run(
        [*command, *map(str, words)], capture_output=True, check=False, text=True
    )
    if done.returncode == 0:
        assert done.stderr == ""
        return done.stdout
    assert done.stdout == ""
    assert done.returncode == 1
    return done.stderr.removeprefix("vhost-airlock: ")


class HeldSwap:
    """A swap in a thread, to a back that does not answer before `go_on` is set."""

    def __init__(self, new: ScriptedBack, path: Path, there: Path) -> None:
        self.go_on = threading.Event()
        self._asked = threading.Event()
        self._new = new
        self._told: list[str] = []
        self._thread = threading.Thread(
            target=lambda: self._told.append(swapped(path, f"--backend={there}"))
        )
        new.instead[Request.GET_FEATURES] = self._answer  # type: ignore[assignment]

    def begin(self) -> None:
        """Begin, and wait until the back is asked."""
        self._thread.start()
        assert self._asked.wait(PATIENCE)

    def end(self) -> str:
        """Wait for the end: the words of swapped()."""
        self._thread.join()
        return self._told[0]

    def _answer(self, payload: Payload, fds: list[Fd]) -> object:
        self._asked.set()
        assert self.go_on.wait(PATIENCE)
        return self._new.answer(Request.GET_FEATURES, payload, fds)


def go(guest: BlkGuest, program: Program, front: Path) -> None:
    guest.connect(program.connect(front))
    guest.start()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[tuple[ScriptedBack, Path]]:
    """Another back, and its place."""
    back = ScriptedBack()
    with listening(back, tmp_path / "other.sock") as where:
        yield back, where


def test_back_end_that_listens_takes_the_place_of_one(
    front: Path,
    path: Path,
    where: Path,
    back: ScriptedBack,
    other: tuple[ScriptedBack, Path],
) -> None:
    """And of the back-end that is lost later, and for the next VMM."""
    new, there = other
    options = (f"--backend={where}", "--device-type=block", "--log-level=info")
    with running(front, path, *options) as program:
        with small_guest() as guest:
            go(guest, program, front)
            serve(back, guest)
            result = swapped(path, f"--backend={there}")
            assert result.startswith("swapped; the guest's queues stood for 0.")
            back.join()
            serve(new, guest)
            document = parse(ask(str(path)), "")
            assert document.total("backend", "swaps") == 1
            started = len(new.got(Request.SET_VRING_KICK))
            lose(new)
            offer(guest, 1)
            wait_until(
                lambda: (
                    len(new.got(Request.SET_VRING_KICK)) > started
                    and new.vrings[0].ring is not None
                ),
                "it is started again",
            )
            new.complete(new.take(), b"c" * 512)
            await_reaped(guest.queues[0])
        with small_guest() as guest:
            go(guest, program, front)
            serve(new, guest)
        assert back.connections == 1
        assert f"{LINE}: info: back-end: swapped; the guest's" in program.everything()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SECTOR * 128))
    return path


def disk(image: Path, *, fails: bool = False) -> tuple[str, ...]:
    """The command of a disk's back-end."""
    return (*BLK, "--fd={fd}", f"--blk-file={image}{'.none' * fails}")


def write(guest: BlkGuest, number: int) -> None:
    buffer = guest.ram.alloc(SECTOR)
    guest.ram.view(buffer, SECTOR)[:] = bytes([number]) * SECTOR
    guest.write(0, [(buffer, SECTOR)])


def read(guest: BlkGuest) -> int:
    buffer = guest.ram.alloc(SECTOR)
    guest.read(0, [(buffer, SECTOR)])
    return guest.ram.view(buffer, SECTOR)[0]


def test_program_takes_the_place_of_a_program(
    front: Path, path: Path, image: Path
) -> None:
    """The old one has ended by then, and the new one ends with the session."""
    with running(front, path, "--", *disk(image)) as program:
        for turn in range(2):
            with BlkGuest() as guest:
                go(guest, program, front)
                write(guest, 2 * turn + 1)
                (old,) = started(program)
                assert swapped(path, "--", *disk(image)).startswith("swapped")
                (new,) = started(program)
                assert new != old
                assert read(guest) == 2 * turn + 1
                write(guest, 2 * turn + 2)
            wait_until(lambda: not started(program), "it has ended")


def test_program_that_does_not_serve_leaves_the_old_one(
    front: Path, path: Path, image: Path
) -> None:
    """Which is started again, since it was ended for it; twice in vain."""
    with running(front, path, "--", *disk(image)) as program, BlkGuest() as guest:
        go(guest, program, front)
        write(guest, 7)
        for _ in range(2):
            reason = swapped(path, "--", *disk(image, fails=True))
            assert reason.startswith("not swapped: back-end: closed the connection")
            assert reason.endswith("; the last back-end was taken again\n")
            assert read(guest) == 7
            assert len(started(program)) == 1
        command = Path(f"/proc/{started(program)[0]}/cmdline").read_bytes()
        assert f"--blk-file={image}".encode() in command.split(b"\0")


def test_program_takes_the_place_of_one_that_listens_and_the_other_way(
    front: Path, path: Path, image: Path, tmp_path: Path
) -> None:
    size = os.stat(image).st_size
    there = DiskBack(sectors=size // SECTOR)
    with (
        listening(there, tmp_path / "back.sock") as where,
        running(front, path, f"--backend={where}") as program,
        BlkGuest() as guest,
    ):
        go(guest, program, front)
        write(guest, 1)
        assert swapped(path, "--", *disk(image)).startswith("swapped")
        assert read(guest) == 0
        write(guest, 2)
        assert len(started(program)) == 1
        assert swapped(path, f"--backend={where}").startswith("swapped")
        assert read(guest) == 1
        assert not started(program)
        guest.disconnect()


def test_another_device_is_told_by_its_difference(
    front: Path, path: Path, image: Path, tmp_path: Path
) -> None:
    larger = tmp_path / "larger.img"
    larger.write_bytes(bytes(2 * SECTOR * 128))
    with running(front, path, "--", *disk(image)) as program, BlkGuest() as guest:
        go(guest, program, front)
        write(guest, 3)
        reason = swapped(path, "--", *disk(larger))
        assert "its configuration space has 0001000000000000" in reason
        assert read(guest) == 3


def test_without_a_vmm_the_next_one_gets_it(
    front: Path, path: Path, where: Path, other: tuple[ScriptedBack, Path]
) -> None:
    new, there = other
    with running(front, path, f"--backend={where}", "--keep-backend") as program:
        assert swapped(path, f"--backend={there}") == (
            "the next VMM gets the new back-end\n"
        )
        with small_guest() as guest:
            go(guest, program, front)
            serve(new, guest)
        # This one is kept, and let go of.
        assert swapped(path, f"--backend={where}").startswith("the next VMM")
        new.join()


def test_while_a_vmm_waits_for_a_back_end_that_is_not_there(
    front: Path, path: Path, tmp_path: Path, other: tuple[ScriptedBack, Path]
) -> None:
    """For as long as it takes, if it is the first one."""
    new, there = other
    with (
        running(front, path, f"--backend={tmp_path}/none.sock") as program,
        program.connect(front) as channel,
    ):
        wait_until(
            lambda: "a VMM waits, trying again" in program.everything(), "it waits"
        )
        swapped(path, f"--backend={there}")
        with small_guest() as guest:
            guest.connect(channel)
            guest.start()
            serve(new, guest)


CONNECTS = """
import os, sys
from vhost_airlock.peers.disk import Disk
from vhost_airlock.peers.server import DeviceServer
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import Fd
file = Fd(os.open(sys.argv[2], os.O_RDWR))
channel = Channel.connect(sys.argv[1], peer="front")
DeviceServer(channel, Disk(file, num_queues=2)).run()
"""
"""A block back-end that connects."""


def test_while_the_back_end_that_connects_is_away(
    front: Path, path: Path, tmp_path: Path, image: Path
) -> None:
    """Its process has ended, so the new one can't disturb it, whatever the fence is."""
    place, there = tmp_path / "connects.sock", tmp_path / "other.sock"
    options = (f"--backend-listen={place}", "--device-type=block", "--fence=exit")
    with (
        running(front, path, *options) as program,
        subprocess.Popen([sys.executable, "-c", CONNECTS, place, image]) as old,
        BlkProcess(str(image), str(there), num_queues=2),
        small_guest() as guest,
    ):
        go(guest, program, front)
        write(guest, 1)
        old.kill()
        old.wait()
        wait_until(
            lambda: "waiting for another back-end" in program.everything(), "it is lost"
        )
        assert swapped(path, f"--backend={there}") == (
            "the back-end is lost; the new one is looked for\n"
        )
        assert read(guest) == 1


def test_not_while_the_back_end_that_connects_may_be_at_work(
    front: Path, path: Path, tmp_path: Path, other: tuple[ScriptedBack, Path]
) -> None:
    """It has hung up, and its process, which is the test's, lives on."""
    back = ScriptedBack()
    new, there = other
    place = tmp_path / "connects.sock"
    options = (f"--backend-listen={place}", "--device-type=block")
    with running(front, path, *options) as program, small_guest() as guest:
        back.start(connect(place, program))
        go(guest, program, front)
        serve(back, guest)
        lose(back)
        wait_until(
            lambda: "waiting for another back-end" in program.everything(), "it is lost"
        )
        assert swapped(path, f"--backend={there}") == (
            "not swapped: the back-end is lost, and may still be at work on its"
            " requests, which another one would get:"
            f" process {os.getpid()} has not ended\n"
        )
        back.join()
        back.start(connect(place, program))
        wait_until(lambda: back.vrings[0].ring is not None, "it is started")
        serve(back, guest)
        assert new.connections == 0
    back.close()


def test_two_at_once(
    front: Path,
    path: Path,
    where: Path,
    back: ScriptedBack,
    other: tuple[ScriptedBack, Path],
) -> None:
    new, there = other
    first = HeldSwap(new, path, there)
    with (
        running(front, path, f"--backend={where}", "--timeout=60") as program,
        small_guest() as guest,
    ):
        go(guest, program, front)
        first.begin()
        assert swapped(path, f"--backend={where}") == (
            "not swapped: another swap is under way\n"
        )
        assert parse(ask(str(path)), "").total("backend", "swaps") == 0
        first.go_on.set()
        assert first.end().startswith("swapped")
        serve(new, guest)
        guest.disconnect()


def test_command_that_can_not_be_carried_out(
    front: Path, path: Path, where: Path, back: ScriptedBack, tmp_path: Path
) -> None:
    """The back-end notices nothing."""
    with (
        running(front, path, f"--backend={where}") as program,
        small_guest() as guest,
    ):
        go(guest, program, front)
        before = len(back.seen)
        for words, reason in (
            ((f"--backend={tmp_path}/none",), "No such file or directory\n"),
            ((f"--backend={tmp_path}",), "it is no socket\n"),
            (("--", f"{tmp_path}/none", "{fd}"), f"is no program {tmp_path}/none\n"),
        ):
            told = swapped(path, *words)
            assert told.startswith("not swapped: no back-end")
            assert told.endswith(reason)
        serve(back, guest)
        assert len(back.seen) == before


def test_airlock_ends_meanwhile(
    front: Path,
    path: Path,
    where: Path,
    back: ScriptedBack,
    other: tuple[ScriptedBack, Path],
) -> None:
    """The command tells it, in whatever way it ends."""
    new, there = other
    first = HeldSwap(new, path, there)
    options = (f"--socket-path={front}", f"--control-path={path}")
    with (
        Program(*options, f"--backend={where}", "--timeout=60") as program,
        small_guest() as guest,
    ):
        go(guest, program, front)
        first.begin()
        program.process.send_signal(signal.SIGKILL)
        said = first.end()
        first.go_on.set()
        assert said == f"no answer at {path}: the airlock has ended, or it is another\n"


def test_only_the_owner_may_connect_whatever_other_sockets_are(
    front: Path, path: Path, where: Path
) -> None:
    options = (f"--backend={where}", "--socket-mode=0666")
    with running(front, path, *options):
        assert path.stat().st_mode & 0o777 == 0o600

        def is_open_to_all() -> bool:
            return front.exists() and front.stat().st_mode & 0o777 == 0o666

        wait_until(is_open_to_all, "the VMM's socket comes last, and then its rights")
        assert path.stat().st_mode & 0o777 == 0o600


def test_stats_at_both_sockets_are_of_one_airlock(
    front: Path, path: Path, where: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stats"
    folder.mkdir()
    path = folder / "control.sock"
    options = (f"--backend={where}", f"--stats-path={folder}/stats.sock")
    with running(front, path, *options) as program:
        for each in folder.iterdir():
            assert parse(ask(str(each)), str(each)).pid == program.pid
        answers, failures = stats_document.ask_all([str(folder)])
        assert (len(answers), failures) == (1, [])
        answers, failures = stats_document.ask_all(list(map(str, folder.iterdir())))
        assert (len(answers), failures) == (2, [])


def test_vmm_that_connects_here_is_refused(
    front: Path, path: Path, where: Path
) -> None:
    with running(front, path, f"--backend={where}"):
        with (
            socket.socket(socket.AF_UNIX) as vmm,
            pytest.raises(OSError, match="Protocol wrong type"),
        ):
            vmm.connect(str(path))
        assert swapped(front, f"--backend={where}") == (
            f"no airlock at {front}: Protocol wrong type for socket\n"
        )


def test_socket_may_be_inherited(front: Path, where: Path, tmp_path: Path) -> None:
    """By the name that it has for a service manager."""
    place = tmp_path / "inherited.sock"
    with socket.socket(socket.AF_UNIX, KIND) as listener:
        listener.bind(str(place))
        listener.listen()
        ways = (f"--socket-path={front}", f"--backend={where}")
        with passed({"control": listener}, *ways) as program:
            program.connect(front).close()
            assert swapped(place, f"--backend={where}").startswith("the next VMM")
            assert program.stop() == 0
    assert place.exists()


def test_hostile_bytes_leave_the_airlock_as_it_is(
    front: Path, path: Path, where: Path, back: ScriptedBack
) -> None:
    with (
        running(front, path, f"--backend={where}") as program,
        small_guest() as guest,
    ):
        go(guest, program, front)
        (broker,) = children(str(program.pid))
        fds = len(os.listdir(f"/proc/{broker}/fd"))
        for data in (b"\0", b"[" * 60000, b'{"do":"swap","command":7}', b"x" * 60000):
            with connect(path, program, KIND) as peer:
                peer.send(data)
                assert list(json.loads(peer.recv(10000))) == ["error"]
        silent = [connect(path, program, KIND) for _ in range(5)]
        serve(back, guest)
        for peer in silent:
            assert b"no command came" in peer.recv(1000)
            peer.close()
        wait_until(
            lambda: len(os.listdir(f"/proc/{broker}/fd")) == fds, "all are closed"
        )
