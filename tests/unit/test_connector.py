# SPDX-License-Identifier: Apache-2.0
"""The ways to the back-end: connecting, waiting, and starting it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vhost_airlock.errors import (
    BackLost,
    DeadlineExceeded,
    Disconnected,
    SessionError,
    StartError,
    Stopped,
    UsageError,
)
from vhost_airlock.process import broker
from vhost_airlock.process.connector import (
    Connector,
    Dialler,
    Starter,
    Waiter,
    make_connector,
)
from vhost_airlock.proxy.config import Config
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import Fd, drain, eventfd, notify
from vhost_airlock.vhost.wire import Request

PYTHON = (sys.executable, "-S", "-E", "-c")

ECHO = """
import socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
    sock = sock.accept()[0]
while data := sock.recv(100):
    sock.send(data)
"""
"""A back-end that sends back what it gets, until its connection ends."""

DEAF = """
import signal, socket, sys
signal.signal(signal.SIGTERM, {handler})
sock = socket.socket(fileno=int(sys.argv[1]))
sock.send(b"x" * 12)
while True:
    signal.pause()
"""
"""A back-end that does not mind its connection."""

HOLDINGS = """
import os, socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
fds = {int(n): os.stat(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
       if os.path.exists(f"/proc/self/fd/{n}")}
sock.send(" ".join(str(fd) for fd in sorted(fds)).encode())
"""
"""A back-end that tells which descriptors it has."""


def held() -> tuple[int, int]:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return len(os.listdir("/proc/self/fd")), len(children)


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No descriptor, no process, no file."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = held()
    yield
    assert held() == before
    assert list(folder.iterdir()) == []


@pytest.fixture
def stop() -> Iterator[Fd]:
    with eventfd() as stop:
        yield stop


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "back.sock")


@pytest.fixture
def stack(stop: Fd) -> Iterator[ExitStack]:
    """Undone while `stop` is there still."""
    with ExitStack() as stack:
        yield stack


def make(stack: ExitStack, stop: Fd, **options: object) -> Connector:
    config = Config(**{"timeout": 5.0, **options})  # type: ignore[arg-type]
    made = make_connector(config, stop)
    stack.callback(made.close)
    stack.callback(made.disconnected)
    return made


def received(channel: Channel) -> bytes:
    """Whatever the back has sent, message or not."""
    with socket.socket(fileno=os.dup(channel.fileno())) as raw:
        return raw.recv(1000)


def assert_echoes(channel: Channel) -> None:
    channel.send(Request.GET_FEATURES, b"hello")
    message = channel.recv()
    assert (message.request, message.payload) == (Request.GET_FEATURES, b"hello")


def listening(path: str, stack: ExitStack) -> socket.socket:
    sock = stack.enter_context(socket.socket(socket.AF_UNIX))
    sock.bind(path)
    sock.listen(5)
    return sock


def test_kind_is_chosen_by_the_config(
    stack: ExitStack, stop: Fd, path: str, tmp_path: Path
) -> None:
    listening(path, stack)
    other = str(tmp_path / "other.sock")
    assert isinstance(make(stack, stop, backend=path), Dialler)
    assert isinstance(make(stack, stop, backend_listen=other), Waiter)
    assert isinstance(make(stack, stop, command=("true", "{fd}")), Starter)


def test_dialler_connects_each_time(stack: ExitStack, stop: Fd, path: str) -> None:
    back = listening(path, stack)
    dialler = make(stack, stop, backend=path)
    for _ in range(3):
        with dialler.connect() as channel, back.accept()[0] as accepted:
            assert channel.peer == "back"
            assert channel.lost is BackLost
            channel.send(Request.SET_OWNER)
            assert len(accepted.recv(100)) == 12
        dialler.disconnected()


def test_dialler_does_not_connect_before_it_is_told(
    stack: ExitStack, stop: Fd, path: str
) -> None:
    """virtiofsd ends with the first connection that does."""
    back = listening(path, stack)
    make(stack, stop, backend=path)
    back.setblocking(False)
    with pytest.raises(BlockingIOError):
        back.accept()


def test_dialler_needs_a_socket_at_once(stop: Fd, path: str) -> None:
    with pytest.raises(StartError, match=f"no back-end at {path}"):
        make_connector(Config(backend=path), stop)


def test_dialler_says_when_nobody_listens(
    stack: ExitStack, stop: Fd, path: str
) -> None:
    listening(path, stack).close()
    dialler = make(stack, stop, backend=path)
    with pytest.raises(Disconnected, match=f"back: can't connect to {path}: Connect"):
        dialler.connect()
    os.unlink(path)
    with pytest.raises(Disconnected, match=f"back: can't connect to {path}: No such"):
        dialler.connect()


def test_waiter_takes_the_back_that_comes(
    stack: ExitStack, stop: Fd, path: str
) -> None:
    waiter = make(stack, stop, backend_listen=path)
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as back:
            back.connect(path)
            with waiter.connect() as channel:
                assert channel.lost is BackLost
                channel.send(Request.SET_OWNER)
                assert len(back.recv(100)) == 12
        waiter.disconnected()
    waiter.close()
    assert not os.path.exists(path)


def test_waiter_waits_for_the_back(stack: ExitStack, stop: Fd, path: str) -> None:
    waiter = make(stack, stop, backend_listen=path)
    back = stack.enter_context(socket.socket(socket.AF_UNIX))
    thread = threading.Timer(0.05, back.connect, [path])
    thread.start()
    waiter.connect().close()
    thread.join()


def test_waiter_does_not_wait_for_ever(stack: ExitStack, stop: Fd, path: str) -> None:
    waiter = make(stack, stop, backend_listen=path, timeout=0.02)
    with pytest.raises(DeadlineExceeded, match=f"did not connect to {path} in 0.02 s"):
        waiter.connect()


def test_waiter_stops_when_told(stack: ExitStack, stop: Fd, path: str) -> None:
    waiter = make(stack, stop, backend_listen=path)
    notify(stop)
    with pytest.raises(Stopped):
        waiter.connect()


def test_waiter_needs_a_place_at_once(stop: Fd, path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(StartError, match=f"can't listen at {path}"):
        make_connector(Config(backend_listen=path), stop)


@pytest.mark.parametrize("placeholder", ["{fd}", "{listen-fd}"])
def test_starter_starts_a_back_for_each_session(
    stack: ExitStack, stop: Fd, placeholder: str
) -> None:
    made = make(stack, stop, command=(*PYTHON, ECHO, placeholder))
    assert isinstance(made, Starter)
    pids = set()
    for _ in range(2):
        with made.connect() as channel:
            assert channel.lost is BackLost
            assert_echoes(channel)
            assert made.pid is not None
            pids.add(made.pid)
        made.disconnected()
        assert made.pid is None
    assert len(pids) == 2


def test_starter_puts_the_number_where_it_is_wanted(stack: ExitStack, stop: Fd) -> None:
    program = "import socket,sys; socket.socket(fileno=int(sys.argv[1][5:])).send(%s)"
    say = program % "' '.join(sys.argv[1:]).encode()"
    made = make(stack, stop, command=(*PYTHON, say, "--fd={fd}", "x{fd}y", "{f}"))
    with made.connect() as channel:
        words = received(channel).decode().split()
    number = words[0].removeprefix("--fd=")
    assert words == [f"--fd={number}", f"x{number}y", "{f}"]


def test_started_back_has_no_other_descriptor_of_ours(
    stack: ExitStack, stop: Fd
) -> None:
    made = make(stack, stop, command=(*PYTHON, HOLDINGS, "{fd}"))
    inherited = stack.enter_context(Fd(os.open("/dev/null", os.O_RDONLY)))
    os.set_inheritable(inherited.fileno(), True)
    with made.connect() as channel:
        fds = [int(word) for word in received(channel).split()]
    assert fds[:3] == [0, 1, 2]
    assert len(fds) == 4


def test_signals_of_the_terminal_are_not_for_the_back(
    stack: ExitStack, stop: Fd
) -> None:
    """It is needed until the rings are drained."""
    made = make(stack, stop, command=(*PYTHON, ECHO, "{fd}"))
    assert isinstance(made, Starter)
    with made.connect():
        assert made.pid is not None
        assert os.getpgid(made.pid) == made.pid
        assert os.getpgid(made.starter.pid) == made.starter.pid


def test_starter_leaves_a_back_time_to_end_by_itself(
    stack: ExitStack, stop: Fd
) -> None:
    made = make(stack, stop, command=(*PYTHON, ECHO, "{fd}"))
    assert isinstance(made, Starter)
    with made.connect() as channel:
        assert_echoes(channel)
    made.disconnected()
    assert made.status == 0
    made.disconnected()


@pytest.mark.parametrize(
    ("handler", "status"),
    [("signal.SIG_DFL", -signal.SIGTERM), ("signal.SIG_IGN", -signal.SIGKILL)],
)
def test_starter_ends_a_back_that_does_not(
    stack: ExitStack,
    stop: Fd,
    monkeypatch: pytest.MonkeyPatch,
    handler: str,
    status: int,
) -> None:
    monkeypatch.setattr(broker, "GRACE", 0.05)
    monkeypatch.setattr(broker, "PATIENCE", 0.05)
    program = DEAF.format(handler=handler)
    made = make(stack, stop, command=(*PYTHON, program, "{fd}"))
    assert isinstance(made, Starter)
    with made.connect() as channel:
        assert received(channel), "it is up, and has its signal handler"
    made.disconnected()
    assert made.status == status


def test_starter_leaves_no_time_when_we_are_told_to_stop(
    stack: ExitStack, stop: Fd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker, "GRACE", 3600)
    program = DEAF.format(handler="signal.SIG_DFL")
    made = make(stack, stop, command=(*PYTHON, program, "{fd}"))
    assert isinstance(made, Starter)
    with made.connect() as channel:
        assert received(channel)
    notify(stop)
    made.disconnected()
    assert made.status == -signal.SIGTERM
    assert drain(stop), "it is for others as well"


@pytest.mark.parametrize(
    "command", [("back",), ("back", "{fd}", "{listen-fd}"), ("back", "{FD}")]
)
def test_starter_needs_a_place_for_the_number(
    stop: Fd, command: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError, match=r"either \{fd\} or \{listen-fd\}"):
        make_connector(Config(command=command), stop)


def test_starter_needs_a_program(stop: Fd, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("text")
    for program in ("/no/such/program", "no-such-program", str(plain), str(tmp_path)):
        with pytest.raises(StartError, match=f"there is no program {program}"):
            make_connector(Config(command=(program, "{fd}")), stop)


def test_starter_says_when_a_program_does_not_start(
    stack: ExitStack, stop: Fd, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    program.write_text("no script and no binary")
    program.chmod(0o755)
    for placeholder in ("{fd}", "{listen-fd}"):
        made = make(stack, stop, command=(str(program), placeholder))
        with pytest.raises(SessionError, match=f"back: can't start {program}: Exec"):
            made.connect()
        made.disconnected()


@pytest.mark.parametrize("placeholder", ["{fd}", "{listen-fd}"])
def test_back_that_ends_at_once_is_a_closed_connection(
    stack: ExitStack, stop: Fd, placeholder: str
) -> None:
    made = make(stack, stop, command=("true", placeholder))
    with (
        made.connect() as channel,
        pytest.raises(Disconnected, match="back: closed the connection"),
    ):
        channel.recv()
    made.disconnected()


def test_back_goes_with_the_process_that_starts_it(stack: ExitStack, stop: Fd) -> None:
    """Though nobody told it to end, as when the airlock was killed."""
    program = DEAF.format(handler="signal.SIG_DFL")
    made = make(stack, stop, command=(*PYTHON, program, "{fd}"))
    assert isinstance(made, Starter)
    with made.connect() as channel:
        assert received(channel)
        pid = made.pid
        assert pid is not None
        made.close()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_signals_to_all_are_not_for_the_process_that_starts(
    stack: ExitStack, stop: Fd
) -> None:
    """A service manager sends them to every process of the service."""
    made = make(stack, stop, command=(*PYTHON, ECHO, "{fd}"))
    assert isinstance(made, Starter)
    made.connect().close()
    made.disconnected()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(made.starter.pid, number)
    with made.connect() as channel:
        assert_echoes(channel)


def test_process_that_starts_takes_no_arguments(
    stack: ExitStack, stop: Fd, tmp_path: Path
) -> None:
    """Nor another program: it has one, and is told when."""
    made = make(stack, stop, command=(*PYTHON, ECHO, "{fd}"))
    assert isinstance(made, Starter)
    wanted = tmp_path / "made"
    for request in (b"start touch %s", b"touch %s", b"start\0touch %s"):
        text, sock = made.starter._ask(request % bytes(wanted))
        assert (text, sock) == ("0", None), "nothing was started that could end"
    with made.connect() as channel:
        assert_echoes(channel)
    assert not wanted.exists()


def test_process_that_starts_may_be_lost(stack: ExitStack, stop: Fd) -> None:
    made = make(stack, stop, command=(*PYTHON, ECHO, "{fd}"))
    assert isinstance(made, Starter)
    with made.connect() as channel:
        os.kill(made.starter.pid, signal.SIGKILL)
        assert_echoes(channel)
    made.disconnected()
    assert made.status is None
    for _ in range(2):
        with pytest.raises(SessionError, match="back: nobody is there to start it"):
            made.connect()
