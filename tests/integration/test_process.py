# SPDX-License-Identifier: Apache-2.0
"""`vhost-airlock run` as its users have it: a process, its sockets, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

from tests.support.airlock import hung_up
from tests.support.backs import PATIENCE, DiskBack, ScriptedBack, readable, wait_until
from tests.support.program import COMMAND, LINE, LOOKED_INTO, Program, listening
from tests.support.sessions import lose, serve, small_guest
from tests.support.talk import talking_back, talking_guest
from vhost_airlock.errors import AirlockError, Disconnected
from vhost_airlock.peers.disk import SECTOR, BlkStatus, BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.server import PROTOCOL_FEATURES, RING_FEATURES
from vhost_airlock.process.back_source import FIRST_ANSWER
from vhost_airlock.process.signals import ENDING
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import Fd
from vhost_airlock.vhost.wire import (
    BackendRequest,
    Feature,
    Payload,
    ProtocolFeature,
    Request,
)

BLK = (sys.executable, "-m", "vhost_airlock.peers.blk")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SECTOR * 128))
    return path


@contextlib.contextmanager
def running(front: Path, where: Path, *options: str) -> Iterator[Program]:
    """A program that ends as it should, with nothing to say but what was read."""
    with Program(f"--socket-path={front}", f"--backend={where}", *options) as program:
        yield program
        assert program.stop() == 0
        assert_clean(program, front)


def assert_clean(program: Program, front: Path) -> None:
    assert program.errors() == ""
    assert not front.exists()


def connect(guest: BlkGuest, program: Program, front: Path) -> None:
    guest.connect(program.connect(front))
    guest.start()


def serve_session(
    program: Program, front: Path, back: ScriptedBack, sock: socket.socket
) -> None:
    """One session, whose back has this connection to the program."""
    back.start(sock)
    with small_guest() as guest:
        connect(guest, program, front)
        serve(back, guest)
    back.join()


def work(guest: BlkGuest) -> None:
    """Write and read back."""
    out, into = guest.ram.alloc(4096), guest.ram.alloc(4096)
    data = os.urandom(4096)
    guest.ram.view(out, 4096)[:] = data
    guest.write(8, [(out, 4096)])
    guest.read(8, [(into, 4096)])
    assert guest.ram.view(into, 4096) == data


def test_front_ends_are_served_one_after_the_other(front: Path, tmp_path: Path) -> None:
    disk = DiskBack(num_queues=2)
    with (
        listening(disk, tmp_path / "back.sock") as where,
        running(front, where) as program,
    ):
        for turn in range(3):
            with BlkGuest(num_queues=2) as guest:
                connect(guest, program, front)
                work(guest)
                if turn:
                    guest.stop()
        assert disk.connections == 3


def test_process_ends_with_the_first_front_end_if_it_shall(
    front: Path, where: Path, back: ScriptedBack
) -> None:
    with (
        Program(f"--socket-path={front}", f"--backend={where}", "--once") as program,
        small_guest() as guest,
    ):
        connect(guest, program, front)
        serve(back, guest)
        guest.disconnect()
        assert program.wait() == 0
        assert_clean(program, front)


def test_second_front_end_waits_for_its_turn(
    front: Path, where: Path, back: ScriptedBack
) -> None:
    with (
        running(front, where, "--log-level=error") as program,
        small_guest() as one,
        small_guest() as two,
    ):
        connect(one, program, front)
        waiting = program.connect(front)
        waiting.send(Request.GET_FEATURES)
        serve(back, one)
        assert not readable(waiting, 0)
        one.disconnect()
        waiting.recv().close()
        waiting.close()
        connect(two, program, front)
        serve(back, two)


@pytest.mark.parametrize("number", ENDING)
def test_signal_drains_what_is_in_flight(
    front: Path, where: Path, back: ScriptedBack, number: signal.Signals
) -> None:
    with Program(f"--socket-path={front}", f"--backend={where}") as program:
        end = partial(program.process.send_signal, number)
        check_draining(program, front, back, end)


def test_end_of_a_pipe_drains_what_is_in_flight(
    front: Path, where: Path, back: ScriptedBack
) -> None:
    """Of two processes that could write to it, both have to end; neither does write."""
    pipe, ours = map(Fd, os.pipe())
    ways = (f"--socket-path={front}", f"--backend={where}")
    option = f"--exit-with-pipe={pipe.fileno()}"
    with (
        pipe,
        Program(*ways, option, pass_fds=[pipe.fileno()]) as program,
        subprocess.Popen(["sleep", "inf"], pass_fds=[ours.fileno()]) as other,
    ):
        ours.close()
        check_draining(program, front, back, other.kill)


def check_draining(
    program: Program, front: Path, back: ScriptedBack, end: Callable[[], None]
) -> None:
    with small_guest() as guest:
        connect(guest, program, front)
        io = guest.queues[0].submit(BlkType.FLUSH)
        guest.queues[0].kick()
        chain = back.take()
        back.ring().arm()
        end()
        assert not readable(guest.front.channel, 0.1), "it waits for the request"
        back.complete(chain)
        assert hung_up(guest.front.channel)
        guest.queues[0].reap()
        assert io.status == BlkStatus.OK
        assert program.wait() == 0
        assert Request.GET_VRING_BASE in back.requests()
        assert_clean(program, front)


@pytest.mark.parametrize("number", ENDING)
def test_signal_is_obeyed_though_the_back_is_not_done(
    front: Path, where: Path, back: ScriptedBack, number: signal.Signals
) -> None:
    with (
        Program(
            f"--socket-path={front}", f"--backend={where}", "--drain-timeout=0.1"
        ) as program,
        small_guest() as guest,
    ):
        connect(guest, program, front)
        guest.queues[0].submit(BlkType.FLUSH)
        guest.queues[0].kick()
        back.take()
        back.ring().arm()
        assert program.stop(number) == 0
        assert program.errors() == (
            f"{LINE}: warning: ring 0: stopped with 1 requests unfinished\n"
        )
        assert not front.exists()


def test_signal_while_nobody_is_there(front: Path, where: Path) -> None:
    with running(front, where) as program:
        program.connect(front).close()


def test_signal_while_the_back_does_not_answer(
    front: Path, where: Path, back: ScriptedBack
) -> None:
    """It has its time to do so, and no more."""
    asked = threading.Event()

    def hold(_: object, fds: list[Fd]) -> NoReturn:
        asked.set()
        assert back.channel is not None
        readable(back.channel, 60)
        raise AirlockError("the test is over")

    back.instead[Request.GET_FEATURES] = hold
    options = (f"--socket-path={front}", f"--backend={where}", "--timeout=1")
    with Program(*options) as program, program.connect(front) as channel:
        channel.send(Request.GET_FEATURES)
        assert asked.wait(PATIENCE)
        assert program.stop() == 0
        assert "back-end: did not answer in time (GET_FEATURES)" in program.errors()
        assert not front.exists()


def test_signals_are_for_the_main_thread(
    front: Path, where: Path, back: ScriptedBack
) -> None:
    """It waits in poll(), which a signal to another thread does not end."""
    stats = front.with_suffix(".stats")
    options = ("--workers=2", f"--stats-path={stats}")
    with running(front, where, *options) as program, small_guest() as guest:
        connect(guest, program, front)
        serve(back, guest)
        blocked = {
            int(task.name): int(task.joinpath("status").read_text().split()[at + 1], 16)
            for task in Path(f"/proc/{program.pid}/task").iterdir()
            for at in [task.joinpath("status").read_text().split().index("SigBlk:")]
        }
        assert len(blocked) == 4
        for task, mask in blocked.items():
            for number in ENDING:
                assert bool(mask & 1 << (number - 1)) == (task != program.pid)


def test_signal_at_any_time_of_the_start_leaves_nothing(
    front: Path, where: Path
) -> None:
    """From the moment that the socket is there."""
    with Program(f"--socket-path={front}", f"--backend={where}") as program:
        while not front.exists():
            assert not program.ended()
        assert program.stop() == 0
        assert_clean(program, front)


# Reasons for which it does not start.


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ([], 2, "one of --socket-path, --fd, --front-connect is needed"),
        (
            ["--pool-limit=none"],
            2,
            "argument --pool-limit: none: no size from 4K to 4G",
        ),
        (
            ["--socket-path=F"],
            2,
            "one of --backend, --backend-listen, --backend-fd, -- COMMAND is",
        ),
        (
            ["--socket-path=F", "--backend=B", "--no-wait"],
            1,
            "no back-end at B: No such file",
        ),
        (["--socket-path=F", "--backend=."], 1, "no back-end at .: it is no socket"),
        (["--fd=77", "--backend=S"], 1, "descriptor 77: Bad file descriptor"),
        (["--fd=0", "--backend=S"], 1, "descriptor 0: Socket operation on non-socket"),
    ],
)
def test_trouble_is_told_in_one_line(
    tmp_path: Path, arguments: list[str], status: int, text: str
) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "S"))
        done = subprocess.run(
            [*COMMAND, *arguments],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
        )
    assert done.returncode == status
    assert done.stdout == ""
    head = ": " if status == 2 else " [^:]+: error: "
    assert re.match(f"vhost-airlock{head}{re.escape(text)}", done.stderr)
    assert done.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"S"}


def test_socket_of_a_live_airlock_is_left_to_it(
    front: Path, where: Path, back: ScriptedBack
) -> None:
    """Before, during and after a session."""
    with (
        running(front, where, "--log-level=error") as program,
        small_guest() as guest,
    ):
        program.connect(front).close()
        for turn in range(3):
            if turn:
                connect(guest, program, front)
                serve(back, guest)
            with Program(f"--socket-path={front}", f"--backend={where}") as second:
                assert second.wait() == 1
                assert second.errors() == (
                    f"{LINE}: error: can't listen at {front}: another process does\n"
                )
            assert front.is_socket()
            if turn:
                serve(back, guest)
                guest.disconnect()
                for queue in guest.queues:
                    queue.reset()


def test_socket_of_a_dead_airlock_is_replaced(
    front: Path, where: Path, back: ScriptedBack
) -> None:
    make_stale(front)
    with running(front, where) as program, small_guest() as guest:
        connect(guest, program, front)
        serve(back, guest)


# Other ways to the front.


@pytest.mark.parametrize("listens", [True, False])
def test_socket_of_the_front_may_be_inherited(
    front: Path, where: Path, back: ScriptedBack, listens: bool
) -> None:
    if listens:
        theirs = socket.socket(socket.AF_UNIX)
        theirs.bind(str(front))
        theirs.listen()
    else:
        ours, theirs = socket.socketpair()
    with theirs:
        program = Program(
            f"--fd={theirs.fileno()}",
            f"--backend={where}",
            pass_fds=[theirs.fileno()],
        )
    with program:
        for _ in range(2):
            with small_guest() as guest:
                if listens:
                    connect(guest, program, front)
                else:
                    guest.connect(Channel(ours))
                    guest.start()
                serve(back, guest)
            if not listens:
                break
        assert (program.stop() if listens else program.wait()) == 0
        assert program.errors() == ""
        assert front.exists() == listens, "who made it removes it"


def test_front_end_that_listens_is_connected_to(
    front: Path, where: Path, back: ScriptedBack
) -> None:
    """Again when it has left, and though it is not there yet."""
    with Program(f"--front-connect={front}", f"--backend={where}") as program:
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(front))
                listener.listen()
                assert readable(listener)
                with small_guest() as guest:
                    guest.connect(Channel(listener.accept()[0]))
                    guest.start()
                    serve(back, guest)
            front.unlink()
        assert program.stop() == 0
        assert program.errors() == ""


# Other ways to the back.


@contextlib.contextmanager
def given(front: Path, back: ScriptedBack, *options: str) -> Iterator[Program]:
    """A program that has inherited its connection to the back."""
    ours, theirs = socket.socketpair()
    back.start(ours)
    fd = theirs.fileno()
    with theirs:
        program = Program(
            f"--socket-path={front}",
            f"--backend-fd={fd}",
            *("--log-level=info", *options),
            pass_fds=[fd],
        )
    with contextlib.closing(back), program:
        yield program


def test_connection_to_the_back_may_be_inherited(
    front: Path, back: ScriptedBack
) -> None:
    """The process ends with it; also a VMM that sends no message leaves it be."""
    with given(front, back, "--device-type=block") as program:
        program.connect(front).close()
        with small_guest() as guest:
            connect(guest, program, front)
            serve(back, guest)
        assert program.wait() == 0
        assert "info: the back-end's only connection has ended" in program.errors()
    assert not front.exists()


def test_inherited_connection_may_be_kept(front: Path, back: ScriptedBack) -> None:
    with given(front, back, "--keep-backend") as program:
        for _ in range(2):
            with small_guest() as guest:
                connect(guest, program, front)
                serve(back, guest)
        assert program.stop() == 0


def test_lost_back_of_an_inherited_connection_is_told(
    front: Path, back: ScriptedBack
) -> None:
    """No other one is waited for, whatever the type of device."""
    with (
        given(front, back, "--device-type=block") as program,
        small_guest() as guest,
    ):
        connect(guest, program, front)
        serve(back, guest)
        lose(back)
        assert program.wait() == 1
        told = program.errors()
    assert "error: back-end: closed the connection\n" in told
    assert "waiting for another" not in told


def test_listening_socket_of_the_back_may_be_inherited(
    front: Path, back: ScriptedBack, tmp_path: Path
) -> None:
    path = tmp_path / "back.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        fd = listener.fileno()
        program = Program(f"--socket-path={front}", f"--backend-fd={fd}", pass_fds=[fd])
    with contextlib.closing(back), program:
        for _ in range(2):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(path))
            serve_session(program, front, back, sock)
        assert program.stop() == 0
        assert_clean(program, front)
    assert path.is_socket()


@pytest.mark.parametrize("placeholder", ["{fd}", "{listen-fd}"])
def test_back_end_is_started_for_each_session(
    front: Path, image: Path, placeholder: str
) -> None:
    command = [*BLK, f"--fd={placeholder}", f"--blk-file={image}"]
    with Program(f"--socket-path={front}", "--", *command) as program:
        for _ in range(2):
            with BlkGuest() as guest:
                connect(guest, program, front)
                work(guest)
                assert len(started(program)) == 1
            wait_until(lambda: not started(program), "it has ended")
        program.connect(front).close()
        assert program.stop() == 0
        assert_clean(program, front)


@pytest.mark.parametrize("placeholder", ["{fd}", "{listen-fd}"])
@pytest.mark.parametrize("kept", [(), ("--keep-backend",)], ids=["", "kept"])
def test_signal_ends_the_back_end_that_was_started(
    front: Path, image: Path, placeholder: str, kept: tuple[str, ...]
) -> None:
    command = [*BLK, f"--fd={placeholder}", f"--blk-file={image}"]
    with (
        Program(f"--socket-path={front}", *kept, "--", *command) as program,
        BlkGuest() as guest,
    ):
        connect(guest, program, front)
        work(guest)
        (child,) = started(program)
        if kept:
            guest.disconnect()
        assert program.stop() == 0
        assert not Path(f"/proc/{child}").exists()
        assert_clean(program, front)


def test_back_end_may_take_long_to_start_again(
    front: Path, image: Path, tmp_path: Path
) -> None:
    """Longer than the first one of those that are started then has for its answer."""
    once = tmp_path / "once"
    script = f'test -e {once} && sleep {1.5 * FIRST_ANSWER}; >{once}; exec "$@"'
    command = ["sh", "-c", script, "sh", *BLK, "--fd={fd}", f"--blk-file={image}"]
    with (
        Program(
            f"--socket-path={front}", "--on-backend-loss=recover", "--", *command
        ) as program,
        BlkGuest() as guest,
    ):
        connect(guest, program, front)
        work(guest)
        (child,) = started(program)
        os.kill(int(child), signal.SIGKILL)
        work(guest)
        assert program.stop() == 0
        assert "it is back, after" in program.errors()


def started(program: Program) -> list[str]:
    """The back-ends: children of the one process that the airlock has for that."""
    (broker,) = children(str(program.pid))
    return children(broker)


def children(pid: str) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_back_end_that_does_not_start_is_told_of(front: Path, tmp_path: Path) -> None:
    with (
        Program(f"--socket-path={front}", "--", "false", "{fd}") as program,
        BlkGuest() as guest,
    ):
        for _ in range(2):
            with pytest.raises(AirlockError):
                connect(guest, program, front)
            guest.disconnect()
        wait_until(lambda: program.errors().count("ended") == 2, "its end is told")
        assert program.stop() == 0
        told = (
            rf"{LINE}: error: back-end: closed the connection before its first message"
            rf"\n{LINE}: warning: back-end: false \(process \d+\) ended: status 1,"
            r" and sent no message: does it take {listen-fd} in place of {fd}\?\n"
        )
        assert re.fullmatch(2 * told, program.errors())
        assert not front.exists()


def test_back_end_may_connect(front: Path, tmp_path: Path, back: ScriptedBack) -> None:
    path = tmp_path / "back.sock"
    with Program(f"--socket-path={front}", f"--backend-listen={path}") as program:
        for _ in range(2):
            with program.connect(path) as ours:
                sock = socket.socket(fileno=os.dup(ours.fileno()))
            serve_session(program, front, back, sock)
        assert program.stop() == 0
        assert_clean(program, front)
        assert not path.exists()
    back.close()


def test_back_end_that_does_not_come_is_told_of(front: Path, tmp_path: Path) -> None:
    path = tmp_path / "back.sock"
    with Program(
        f"--socket-path={front}",
        f"--backend-listen={path}",
        "--timeout=0.1",
        "--no-wait",
    ) as program:
        with BlkGuest() as guest, pytest.raises(AirlockError):
            connect(guest, program, front)
        assert program.stop() == 0
        assert program.errors() == (
            f"{LINE}: warning: no back-end has connected to {path};"
            " a VMM waits for it\n"
            f"{LINE}: error: back-end: did not connect to {path} in time;"
            " the VMM's connection is closed\n"
        )


# When the back goes away.


def make_stale(path: Path) -> None:
    """As a back-end leaves it that was killed. A socket is there all the time."""
    new = path.with_suffix(".new")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(new))
    new.replace(path)


def test_back_end_that_is_not_there_is_tried_for_by_each_front(
    front: Path, tmp_path: Path
) -> None:
    path = tmp_path / "back.sock"
    make_stale(path)
    away = f"back-end: can't connect to {path}: Connection refused"
    with (
        Program(
            f"--socket-path={front}", f"--backend={path}", "--timeout=0.2", "--no-wait"
        ) as program,
        small_guest() as guest,
    ):
        with pytest.raises(AirlockError):
            connect(guest, program, front)
        guest.disconnect()
        assert program.errors() == (
            f"{LINE}: warning: {away}; a VMM waits, trying again\n"
            f"{LINE}: error: {away}; the VMM's connection is closed\n"
        )
        back = ScriptedBack()
        with listening(back, path):
            connect(guest, program, front)
            serve(back, guest)
            guest.disconnect()
            assert program.stop() == 0


@pytest.mark.parametrize("stale", [True, False])
def test_first_back_end_is_waited_for_however_long_it_takes(
    front: Path, tmp_path: Path, stale: bool
) -> None:
    """Longer than any time-out; the front that has come meanwhile is served."""
    path = tmp_path / "back.sock"
    if stale:
        make_stale(path)
    back = ScriptedBack()
    with (
        Program(
            f"--socket-path={front}", f"--backend={path}", "--timeout=0.5"
        ) as program,
        small_guest() as guest,
    ):
        channel = program.connect(front)
        wait_until(lambda: tries(program), "it tries")
        assert not readable(channel, 1), "it has not hung up"
        with listening(back, path):
            wait_until(lambda: back.connections == 1, "it is connected to")
            channel.close()
            connect(guest, program, front)
            serve(back, guest)
            guest.disconnect()
            assert program.stop() == 0
            assert back.connections == 1


def test_back_end_that_is_away_for_a_while_loses_no_front(
    front: Path, tmp_path: Path
) -> None:
    path = tmp_path / "back.sock"
    ways = [f"--socket-path={front}", f"--backend={path}", "--timeout=60"]
    with Program(*ways) as program, small_guest() as guest:
        for turn in range(3):
            channel = program.connect(front)
            wait_until(partial(tries, program, turn + 1), "it tries")
            back = ScriptedBack()
            with listening(back, path):
                guest.connect(channel)
                guest.start()
                serve(back, guest)
                guest.disconnect()
            for queue in guest.queues:
                queue.reset()
        assert program.stop() == 0


def tries(program: Program, times: int = 1) -> bool:
    """Has it said so often that the back is away?"""
    return program.errors().count("trying again") >= times


def test_signal_while_the_back_is_away(front: Path, tmp_path: Path) -> None:
    ways = [f"--socket-path={front}", f"--backend={tmp_path}/none"]
    with Program(*ways) as program, program.connect(front):
        wait_until(lambda: tries(program), "it tries")
        assert program.stop() == 0
        assert not front.exists()


def test_no_connection_to_the_back_is_made_for_nothing(
    front: Path, where: Path, back: ScriptedBack
) -> None:
    """Some back-ends end with the first connection that does."""
    with running(front, where) as program, small_guest() as guest:
        for _ in range(3):
            program.connect(front).close()
        connect(guest, program, front)
        serve(back, guest)
        assert back.connections == 1


def test_connection_that_was_lost_before_a_front_needed_it_is_made_again(
    front: Path, where: Path, back: ScriptedBack
) -> None:
    with running(front, where) as program, small_guest() as guest:
        program.connect(front).close()
        wait_until(lambda: back.channel is not None, "it is connected to")
        lose(back)
        connect(guest, program, front)
        serve(back, guest)
        assert back.connections == 2


def test_loss_of_the_back_ends_the_session(
    front: Path, where: Path, back: ScriptedBack
) -> None:
    with (
        Program(f"--socket-path={front}", f"--backend={where}") as program,
        small_guest() as guest,
    ):
        for _ in range(2):
            connect(guest, program, front)
            serve(back, guest)
            lose(back)
            assert hung_up(guest.front.channel)
            guest.disconnect()
            for queue in guest.queues:
                queue.reset()
        assert program.stop() == 0
        assert (
            program.errors() == 2 * f"{LINE}: error: back-end: closed the connection\n"
        )
        assert not front.exists()


def test_fence_waits_for_the_end_of_the_process(
    front: Path, where: Path, back: ScriptedBack
) -> None:
    """The back has hung up, and its process, which is the test's, lives on."""
    with (
        Program(
            *(f"--socket-path={front}", f"--backend={where}", "--recover-for=0.3"),
            *("--on-backend-loss=recover", "--fence=exit"),
        ) as program,
        small_guest() as guest,
    ):
        connect(guest, program, front)
        serve(back, guest)
        lose(back)
        assert hung_up(guest.front.channel)
        *_, last = program.errors().splitlines()
        assert last == (
            f"{LINE}: error: back-end: the last one may still be at work: process"
            f" {os.getpid()} has not ended; no other back-end came in 0.3 s"
        )
        assert program.stop() == 0


@pytest.mark.parametrize("moment", ["session", "connect", "features"])
def test_loss_of_the_back_ends_the_process_if_it_shall(
    front: Path, where: Path, back: ScriptedBack, moment: str
) -> None:
    with (
        Program(
            f"--socket-path={front}",
            f"--backend={where}",
            "--on-backend-loss=exit",
            "--no-wait",
            "--timeout=0.5",
        ) as program,
        small_guest() as guest,
    ):
        if moment == "connect":
            make_stale(where)
        first = program.connect(front)
        if moment == "connect":
            assert hung_up(first)
        elif moment == "features":
            back.offered = 0
            first.send(Request.GET_FEATURES)
        else:
            guest.connect(first)
            guest.start()
            serve(back, guest)
            lose(back)
        if moment == "features":
            # It is there, and of no use.
            assert hung_up(first)
            assert program.stop() == 0
            assert program.errors().startswith(
                f"{LINE}: error: back-end: features 0x0 lack"
            )
        else:
            assert program.wait() == 1
            *_, last = program.errors().splitlines()
            assert last == (
                f"{LINE}: error: the back-end is gone: ending (--on-backend-loss=exit)"
            )
        first.close()
        assert not front.exists()


# A back that is kept.


def test_kept_back_end_serves_one_front_after_the_other(
    front: Path, where: Path, back: ScriptedBack
) -> None:
    with running(front, where, "--keep-backend") as program:
        for turn in range(4):
            with BlkGuest(num_queues=1 + turn % 3, queue_size=16, seg_max=6) as guest:
                connect(guest, program, front)
                for index in range(len(guest.queues)):
                    serve(back, guest, index)
                if turn % 2:
                    guest.stop()
            # Somebody looks in, and has no need of the back.
            program.connect(front).close()
        assert back.connections == 1
        assert len(back.got(Request.SET_OWNER)) == 1
        assert len(back.got(Request.SET_FEATURES)) == 1
        # Memory was announced once: rings and a first part of the pool.
        assert len(back.got(Request.ADD_MEM_REG)) == 2


def test_kept_back_end_is_reset_between_fronts(front: Path, tmp_path: Path) -> None:
    back = ScriptedBack(
        protocol_features=PROTOCOL_FEATURES | ProtocolFeature.RESET_DEVICE
    )
    with (
        listening(back, tmp_path / "back.sock") as where,
        running(front, where, "--keep-backend") as program,
    ):
        for _ in range(2):
            with small_guest(also=[ProtocolFeature.RESET_DEVICE]) as guest:
                connect(guest, program, front)
                serve(back, guest)
        # Known when the next front-end has an answer.
        channel = program.connect(front)
        channel.send(Request.GET_FEATURES)
        channel.recv().close()
        channel.close()
        assert len(back.got(Request.RESET_DEVICE)) == 2
        assert back.connections == 1


def test_f2_kept_back_end_is_told_again_what_a_reset_makes_it_forget(
    front: Path, tmp_path: Path
) -> None:
    """virtiofsd forgets its features, and a ring does not start without them."""
    P = ProtocolFeature
    back = ScriptedBack(protocol_features=PROTOCOL_FEATURES | P.RESET_DEVICE)

    def reset(_: Payload, fds: list[Fd]) -> None:
        back.features = 0

    back.instead[Request.RESET_DEVICE] = reset
    with (
        listening(back, tmp_path / "back.sock") as where,
        running(front, where, "--keep-backend") as program,
    ):
        for turn in range(1, 4):
            with small_guest(also=[P.RESET_DEVICE]) as guest:
                connect(guest, program, front)
                assert len(back.got(Request.SET_FEATURES)) == turn
                assert back.features & Feature.VERSION_1
                serve(back, guest)
        assert back.connections == 1


def test_c4_kept_back_end_tells_a_front_of_what_it_has_not_accepted(
    front: Path, tmp_path: Path
) -> None:
    """The second VMM takes requests of the back, and has no configuration space."""
    back = talking_back()
    with (
        listening(back, tmp_path / "back.sock") as where,
        running(front, where, "--keep-backend") as program,
    ):
        with talking_guest() as guest:
            connect(guest, program, front)
            serve(back, guest)
        also, without = [ProtocolFeature.BACKEND_REQ], [ProtocolFeature.CONFIG]
        with small_guest(also=also, without=without) as guest:
            guest.connect(program.connect(front))
            ours, theirs = socket.socketpair()
            with theirs, Fd(ours.detach()) as heard:
                guest.front.set_backend_req_fd(theirs)
                guest.start()
                assert back.asking is not None
                for _ in range(3):
                    back.asking.exchange(BackendRequest.CONFIG_CHANGE_MSG)
                serve(back, guest)
                assert not readable(heard, 0)
        assert back.connections == 1


def used(back: ScriptedBack) -> list[int]:
    """The blocks that are in use of each region that the back has had."""
    return [os.fstat(fd.fileno()).st_blocks for fd in back.memory_fds()]


def test_i7_kept_back_end_finds_no_bytes_of_the_front_before(
    front: Path, where: Path, back: ScriptedBack
) -> None:
    """When the next front-end has an answer, isolated memory is empty."""
    with running(front, where, "--keep-backend") as program:
        with small_guest() as guest:
            connect(guest, program, front)
            serve(back, guest)
            assert any(used(back))
        with small_guest() as guest:
            guest.connect(program.connect(front))
            guest.front.get_features()
            assert used(back) == [0, 0]
            guest.start()
            serve(back, guest)
        assert back.connections == 1


def test_kept_back_end_that_is_lost_is_connected_to_again(
    front: Path, where: Path, back: ScriptedBack
) -> None:
    with Program(
        f"--socket-path={front}", f"--backend={where}", "--keep-backend"
    ) as program:
        for turn in range(3):
            with small_guest() as guest:
                connect(guest, program, front)
                serve(back, guest)
                guest.stop()
                if turn == 1:
                    lose(back)
                    assert hung_up(guest.front.channel)
            if turn == 0:
                program.connect(front).close()
                lose(back)
        assert back.connections == 3
        assert program.stop() == 0
        assert not front.exists()


def test_loss_of_the_broker_ends_the_process_when_it_is_needed(
    front: Path, where: Path, back: ScriptedBack
) -> None:
    with Program(f"--socket-path={front}", f"--backend={where}") as program:
        with small_guest() as guest:
            connect(guest, program, front)
            (broker,) = children(str(program.pid))
            os.kill(int(broker), signal.SIGKILL)
            serve(back, guest)
        with program.connect(front):
            assert program.wait() == 1
        assert program.errors() == f"{LINE}: error: the broker is gone\n"


# Bad peers.


@pytest.mark.parametrize(
    ("features", "protocol", "slots", "text"),
    [
        (Feature.PROTOCOL_FEATURES, PROTOCOL_FEATURES, 64, "lack VIRTIO_F_VERSION_1"),
        (RING_FEATURES, PROTOCOL_FEATURES, 1, "GET_MAX_MEM_SLOTS: 1 are too few"),
    ],
)
def test_back_end_without_what_we_need_is_told_of(
    front: Path, tmp_path: Path, features: int, protocol: int, slots: int, text: str
) -> None:
    back = ScriptedBack(features=features, protocol_features=protocol, slots=slots)
    with (
        listening(back, tmp_path / "back.sock") as where,
        Program(f"--socket-path={front}", f"--backend={where}") as program,
        BlkGuest() as guest,
    ):
        with pytest.raises(AirlockError):
            connect(guest, program, front)
        guest.disconnect()
        assert program.stop() == 0
        (line,) = program.errors().splitlines()
        assert line.startswith(f"{LINE}: error: back-end: ")
        assert text in line


def test_back_end_without_anything_optional_will_do(
    front: Path, tmp_path: Path
) -> None:
    """No protocol features, no tables, no event index."""
    back = ScriptedBack(features=Feature.VERSION_1, protocol_features=0)
    with (
        listening(back, tmp_path / "back.sock") as where,
        running(front, where) as program,
        BlkGuest(queue_size=16, seg_max=6) as guest,
    ):
        connect(guest, program, front)
        serve(back, guest)
        guest.stop()
        guest.start()
        serve(back, guest)
        assert Request.SET_PROTOCOL_FEATURES not in back.requests()
        assert Request.SET_VRING_ENABLE not in back.requests()
        assert back.requests().count(Request.SET_MEM_TABLE) == 1


def test_front_end_that_breaks_the_protocol_is_told_of(
    front: Path, where: Path, back: ScriptedBack
) -> None:
    with Program(f"--socket-path={front}", f"--backend={where}") as program:
        with program.connect(front) as channel:
            channel.send(Request.SET_FEATURES, b"short")
            assert hung_up(channel)
        with small_guest() as guest:
            connect(guest, program, front)
            serve(back, guest)
        assert program.stop() == 0
        assert program.errors() == (
            f"{LINE}: error: VMM: SET_FEATURES: U64 has 5 bytes, not 8\n"
        )


def enable_all(guest: BlkGuest) -> None:
    """Rings that were never set up; each has descriptors from then on."""
    for index in range(256):
        guest.front.set_vring_enable(index, True)


def test_session_that_takes_more_than_there_is_ends_alone(
    front: Path, where: Path, back: ScriptedBack
) -> None:
    ways = [f"--socket-path={front}", f"--backend={where}"]
    with Program(*ways, *LOOKED_INTO) as program:
        with small_guest() as guest:
            connect(guest, program, front)
            serve(back, guest)
            leave_room(program, 20)
            with pytest.raises(AirlockError):
                enable_all(guest)
        with small_guest() as guest:
            connect(guest, program, front)
            serve(back, guest)
        assert program.stop() == 0
        (line,) = program.errors().splitlines()
        assert line.endswith("that a session takes: [Errno 24] Too many open files")


def leave_room(program: Program, room: int) -> tuple[int, int]:
    """Let it have only so many more descriptors; returns its limits before."""
    most = max(int(fd.name) for fd in Path(f"/proc/{program.pid}/fd").iterdir())
    _, hard = resource.prlimit(program.pid, resource.RLIMIT_NOFILE)
    limits = (most + 1 + room, hard)
    return resource.prlimit(program.pid, resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("room", range(8))
def test_want_of_descriptors_at_the_start_of_a_session_ends_no_more_than_that(
    front: Path, where: Path, back: ScriptedBack, room: int
) -> None:
    """With some room the front is served, with some it has to wait, or is let go."""
    ways = [f"--socket-path={front}", f"--backend={where}"]
    with Program(*ways, *LOOKED_INTO) as program, small_guest() as guest:
        with small_guest() as first:
            connect(first, program, front)
            serve(back, first)
        tasks = Path(f"/proc/{program.pid}/task")
        wait_until(lambda: len(list(tasks.iterdir())) == 1, "it waits for the next")
        limits = leave_room(program, room)
        with program.connect(front) as channel:
            with contextlib.suppress(Disconnected):
                channel.send(Request.GET_FEATURES)
            wait_until(
                lambda: readable(channel, 0) or "no room" in program.errors(),
                "it has met its limit",
            )
        resource.prlimit(program.pid, resource.RLIMIT_NOFILE, limits)
        connect(guest, program, front)
        serve(back, guest)
        assert back.connections <= 3, "there were none for nothing"
        assert program.stop() == 0
        assert "Traceback" not in program.errors()


NO_THREADS = """
import os, sys, threading
from vhost_airlock.cli import main as cli, run
start = threading.Thread.start
def want(thread):
    if not os.path.exists(sys.argv[1]):
        raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = want
sys.exit(cli.main(["run", *sys.argv[2:]]))
"""


def test_want_of_threads_ends_the_session_and_not_the_process(
    front: Path, where: Path, back: ScriptedBack, tmp_path: Path
) -> None:
    allowed = tmp_path / "allowed"
    command = (sys.executable, "-c", NO_THREADS, str(allowed))
    ways = [f"--socket-path={front}", f"--backend={where}", "--sandbox=off"]
    with Program(*ways, command=command) as program, small_guest() as guest:
        with program.connect(front) as channel:
            assert hung_up(channel)
        allowed.touch()
        connect(guest, program, front)
        serve(back, guest)
        assert program.stop() == 0
        (line,) = program.errors().splitlines()
        assert line == (
            f"{LINE}: error: the system lacks a resource that a session takes:"
            " can't start new thread"
        )


# Options that show from outside.


@pytest.mark.parametrize(
    "options",
    [
        ["--copy=used+tail"],
        ["--workers=3"],
        ["--poll-us=0"],
        ["--poll-us=1000000"],
        ["--pool-limit=64K"],
        ["--device-type=block"],
        ["--pool-limit=64K", "--workers=2", "--poll-us=1000", "--copy=used+tail"],
    ],
    ids=" ".join,
)
def test_option(front: Path, tmp_path: Path, options: list[str]) -> None:
    disk = DiskBack(num_queues=3)
    with (
        listening(disk, tmp_path / "back.sock") as where,
        running(front, where, *options, *LOOKED_INTO) as program,
        BlkGuest(num_queues=3, queue_size=16, seg_max=6) as guest,
    ):
        connect(guest, program, front)
        for _ in range(3):
            work(guest)
        workers = next((o[-1] for o in options if o.startswith("--workers")), "1")
        assert program.holdings().threads == 1 + int(workers)


def test_workers_are_bound_to_processors(front: Path, tmp_path: Path) -> None:
    """In turn; the sandbox lets them, and the main thread runs anywhere."""
    processors = os.sched_getaffinity(0)
    first, second = max(processors), min(processors)
    disk = DiskBack(num_queues=3)
    with (
        listening(disk, tmp_path / "back.sock") as where,
        running(
            front, where, "--workers=3", f"--worker-cpus={first},{second}"
        ) as program,
        BlkGuest(num_queues=3, queue_size=16, seg_max=6) as guest,
    ):
        connect(guest, program, front)
        work(guest)
        tasks = sorted(
            int(task.name) for task in Path(f"/proc/{program.pid}/task").iterdir()
        )
        bound = [processors, {first}, {second}, {first}]
        wait_until(lambda: [*map(os.sched_getaffinity, tasks)] == bound, "bound")


def test_log_tells_of_sessions_if_it_shall(
    front: Path, where: Path, back: ScriptedBack
) -> None:
    with Program(
        f"--socket-path={front}", f"--backend={where}", "--log-level=debug"
    ) as program:
        with small_guest() as guest:
            connect(guest, program, front)
            serve(back, guest)
        back.join()
        assert program.stop() == 0
        lines = program.errors().splitlines()
    assert all(line.startswith(f"{LINE}: ") for line in lines)
    (counters,) = [line for line in lines if "counters: " in line]
    assert counters.startswith(f"{LINE}: debug: ")
    rings = json.loads(counters.partition("counters: ")[2])
    assert rings["ring 0"]["completions"] == 1
    assert f"{LINE}: info: SIGTERM: the airlock ends" in lines


def test_capabilities_are_printed_whatever_else_there_is(tmp_path: Path) -> None:
    blk = [*BLK, "--fd={fd}", "--blk-file=/nowhere"]
    program = tmp_path / "blk"
    program.write_text("#!/bin/sh\nexec " + " ".join(BLK) + ' "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        [
            *COMMAND,
            "--print-capabilities",
            "--backend=/no",
            "--",
            str(program),
            *blk[3:],
        ],
        capture_output=True,
        check=True,
    )
    features = ["blk-file", "read-only"]
    assert json.loads(done.stdout) == {"type": "block", "features": features}
    assert done.stderr == b""


def test_started_program_holds_nothing_of_its_parents(front: Path, where: Path) -> None:
    with Fd(os.open("/dev/null", os.O_RDONLY)) as mine:
        os.set_inheritable(mine.fileno(), True)
        with (
            running(front, where, *LOOKED_INTO) as program,
            program.connect(front) as channel,
        ):
            channel.send(Request.GET_FEATURES)
            channel.recv().close()
            # It waits for the next message now: nothing comes and goes.
            assert program.holdings().fds < 13
