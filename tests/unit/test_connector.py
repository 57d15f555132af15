# SPDX-License-Identifier: Apache-2.0
"""The ways to the back-end: connecting, waiting, starting it; and the broker's part."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.airlock import hung_up
from tests.support.backs import wait_until
from tests.support.limits import no_more_fds
from vhost_airlock.errors import (
    AirlockError,
    BackLost,
    DeadlineExceeded,
    Disconnected,
    SessionError,
    StartError,
    Stopped,
    UsageError,
)
from vhost_airlock.process import broker, connector, program, sockets
from vhost_airlock.process.broker import Broker
from vhost_airlock.process.config import ProcessConfig
from vhost_airlock.process.connector import (
    Connector,
    Dialler,
    Given,
    Starter,
    Waiter,
    make_connector,
)
from vhost_airlock.process.control import KIND
from vhost_airlock.process.sockets import OWNER, Listener, peer_of
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


def broker_for(config: ProcessConfig, stop: Fd) -> Broker:
    """A broker that does not run yet."""
    return Broker(
        stop, back=config.backend, front=config.front_connect, command=config.command
    )


def make(stack: ExitStack, stop: Fd, **options: object) -> Connector:
    config = ProcessConfig(**options)  # type: ignore[arg-type]
    helper = broker_for(config, stop)
    stack.callback(helper.close)
    made = make_connector(config, stop, helper)
    stack.callback(made.close)
    helper.start()
    stack.callback(made.disconnected)
    return made


def require(config: ProcessConfig, stop: Fd) -> None:
    """Raise the error that this config has at once, if it has one."""
    make_connector(config, stop, broker_for(config, stop))


def connect(made: Connector, seconds: float = 5.0) -> Channel:
    return made.connect(time.monotonic() + seconds)


def received(channel: Channel) -> bytes:
    """The bytes that the back has sent, a message or not."""
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
    listener = listening(f"{path}.passed", stack)
    assert isinstance(make(stack, stop, backend_fd=listener.detach()), Waiter)
    ours, theirs = socket.socketpair()
    with ours:
        assert isinstance(make(stack, stop, backend_fd=theirs.detach()), Given)


def test_connection_that_is_there_is_given_once(stack: ExitStack, stop: Fd) -> None:
    ours, theirs = socket.socketpair()
    given = make(stack, stop, backend_fd=theirs.detach())
    assert not given.spent
    with ours, connect(given) as channel:
        assert (channel.peer, channel.lost) == ("back-end", BackLost)
        assert given.users() == {os.geteuid()}
        channel.send(Request.SET_OWNER)
        assert len(ours.recv(100)) == 12
    given.disconnected()
    assert given.spent
    with pytest.raises(BackLost, match="passed to the airlock has ended, and there is"):
        given.connect(None)


def test_connection_needs_a_socket(stop: Fd, path: str) -> None:
    Path(path).touch()
    with Fd(os.open(path, os.O_RDWR)) as file:
        number = file.fileno()
        with pytest.raises(StartError, match=f"descriptor {number}: Socket operation"):
            require(ProcessConfig(backend_fd=number), stop)


def test_users_of_a_back_that_listens_or_connects_are_the_peers(
    stack: ExitStack, stop: Fd, path: str, tmp_path: Path
) -> None:
    me = frozenset({os.geteuid()})
    listening(path, stack)
    dialler = make(stack, stop, backend=path)
    assert dialler.users() == frozenset()
    with connect(dialler):
        assert dialler.users() == me
    other = str(tmp_path / "other.sock")
    waiter = make(stack, stop, backend_listen=other)
    with socket.socket(socket.AF_UNIX) as back:
        back.connect(other)
        with connect(waiter):
            assert waiter.users() == me


def test_first_back_may_be_awaited_for_a_while(
    stack: ExitStack, stop: Fd, path: str
) -> None:
    made = make(stack, stop, backend=path, wait_for=0.1)
    with pytest.raises(
        StartError, match=r"No such file or directory, 0\.1 s after the"
    ):
        made.await_there()
    comes = threading.Timer(0.1, lambda: listening(path, stack))
    stack.callback(comes.join)
    patient = make(stack, stop, backend=path, wait_for=60)
    comes.start()
    patient.await_there()
    make(stack, stop, backend=path).await_there()
    notify(stop)
    os.unlink(path)
    with pytest.raises(Stopped):
        patient.await_there()


LISTENS = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.bind(sys.argv[1])
sock.listen()
sock.accept()[0].close()
os.read(0, 1)
"""
"""A back-end that hangs up, and lives on until its standard input ends."""


def lives_until_its_end(made: Connector, command: list[str]) -> None:
    """Take the connection of a back-end that this command starts, and end it."""
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        with connect(made) as channel:
            assert hung_up(channel)
        assert made.lives() == f"process {process.pid} has not ended"
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        assert made.lives() == ""


def test_back_that_was_connected_to_lives_until_its_process_ends(
    stack: ExitStack, stop: Fd, path: str
) -> None:
    made = make(stack, stop, backend=path)
    assert made.lives() == ""
    lives_until_its_end(made, [*PYTHON, LISTENS, path])


CONNECTS = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
sock.close()
os.read(0, 1)
"""
"""The same by one that connects."""


def test_back_that_has_connected_lives_until_its_process_ends(
    stack: ExitStack, stop: Fd, path: str
) -> None:
    made = make(stack, stop, backend_listen=path)
    assert made.lives() == ""
    for _ in range(2):
        lives_until_its_end(made, [*PYTHON, CONNECTS, path])


def test_kernel_may_not_tell_which_back_has_connected(
    stack: ExitStack, stop: Fd, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux before 6.5."""
    monkeypatch.setattr(sockets, "SO_PEERPIDFD", 1 << 20)
    made = make(stack, stop, backend_listen=path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        connect(made).close()
    assert made.lives() == "its process is not known; one that connects is taken"


def test_program_ends_with_its_connection(stack: ExitStack, stop: Fd) -> None:
    assert make(stack, stop, command=("true", "{fd}")).lives() == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
@pytest.mark.parametrize("placeholder", ["{fd}", "{listen-fd}"])
def test_users_of_a_program_are_its_own_once_it_has_answered(
    stack: ExitStack, stop: Fd, placeholder: str
) -> None:
    """The socket says that it is the broker, which has made it."""
    became = ("setpriv", "--ruid=4242", "--euid=4343", "--clear-groups")
    made = make(stack, stop, command=(*became, *PYTHON, ECHO, placeholder))
    with connect(made) as channel:
        assert_echoes(channel)
        assert made.users() == {4242, 4343}
        with socket.socket(fileno=os.dup(channel.fileno())) as same:
            assert peer_of(same).uid == 0
    made.disconnected()
    assert made.users() == frozenset()


def test_dialler_connects_each_time(stack: ExitStack, stop: Fd, path: str) -> None:
    back = listening(path, stack)
    dialler = make(stack, stop, backend=path)
    for _ in range(3):
        with connect(dialler) as channel, back.accept()[0] as accepted:
            assert channel.peer == "back-end"
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


def test_dialler_needs_a_socket_at_once_if_it_may_not_wait(stop: Fd, path: str) -> None:
    with pytest.raises(StartError, match=f"no back-end at {path}"):
        require(ProcessConfig(backend=path, no_wait=True), stop)


def test_dialler_says_that_it_waits(
    stop: Fd, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    require(ProcessConfig(backend=path), stop)
    (record,) = caplog.records
    assert record.message == (
        f"no back-end at {path}: No such file or directory; waiting for it"
    )


def test_dialler_never_waits_where_no_socket_can_come(stop: Fd, path: str) -> None:
    Path(path).touch()
    for bad in (path, f"{path}/sock", ""):
        with pytest.raises(StartError, match=f"no back-end at {bad}: "):
            require(ProcessConfig(backend=bad), stop)


def test_dialler_says_when_nobody_listens(
    stack: ExitStack, stop: Fd, path: str
) -> None:
    listening(path, stack).close()
    dialler = make(stack, stop, backend=path)
    with pytest.raises(BackLost, match=f"back-end: can't connect to {path}: Connect"):
        connect(dialler, 0)
    os.unlink(path)
    with pytest.raises(BackLost, match=f"back-end: can't connect to {path}: No such"):
        connect(dialler, 0)


@pytest.mark.parametrize("deadline", [True, False])
def test_dialler_waits_for_the_back(
    stack: ExitStack, stop: Fd, path: str, deadline: bool
) -> None:
    dialler = make(stack, stop, backend=path)
    thread = threading.Timer(0.1, listening, [path, stack])
    thread.start()
    (connect(dialler) if deadline else dialler.connect(None)).close()
    thread.join()


def test_dialler_waits_for_a_back_that_has_no_room(
    stack: ExitStack, stop: Fd, path: str
) -> None:
    """Its queue is full: the broker must not wait in connect()."""
    back = stack.enter_context(socket.socket(socket.AF_UNIX))
    back.bind(path)
    back.listen(0)
    dialler = make(stack, stop, backend=path)
    with connect(dialler):
        with pytest.raises(BackLost, match="temporarily unavailable"):
            connect(dialler, 0.01)
        back.accept()[0].close()
        connect(dialler).close()


def test_dialler_stops_when_told(stack: ExitStack, stop: Fd, path: str) -> None:
    dialler = make(stack, stop, backend=path)
    threading.Timer(0.1, notify, [stop]).start()
    with pytest.raises(Stopped):
        dialler.connect(None)


def test_waiter_takes_the_back_that_comes(
    stack: ExitStack, stop: Fd, path: str
) -> None:
    waiter = make(stack, stop, backend_listen=path)
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as back:
            back.connect(path)
            with connect(waiter) as channel:
                assert channel.lost is BackLost
                channel.send(Request.SET_OWNER)
                assert len(back.recv(100)) == 12
        waiter.disconnected()
    waiter.close()
    assert os.path.exists(path), "the broker removes it"
    waiter.broker.close()
    assert not os.path.exists(path)


def test_waiter_waits_for_the_back(stack: ExitStack, stop: Fd, path: str) -> None:
    waiter = make(stack, stop, backend_listen=path)
    back = stack.enter_context(socket.socket(socket.AF_UNIX))
    thread = threading.Timer(0.05, back.connect, [path])
    thread.start()
    connect(waiter).close()
    thread.join()


def test_waiter_does_not_wait_for_ever(stack: ExitStack, stop: Fd, path: str) -> None:
    waiter = make(stack, stop, backend_listen=path)
    with pytest.raises(DeadlineExceeded, match=f"did not connect to {path} in time"):
        connect(waiter, 0.02)


def test_waiter_stops_when_told(stack: ExitStack, stop: Fd, path: str) -> None:
    waiter = make(stack, stop, backend_listen=path)
    notify(stop)
    with pytest.raises(Stopped):
        connect(waiter)


def test_waiter_needs_a_place_at_once(stop: Fd, path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(StartError, match=f"can't listen at {path}"):
        require(ProcessConfig(backend_listen=path), stop)


@pytest.mark.parametrize("placeholder", ["{fd}", "{listen-fd}"])
def test_starter_starts_a_back_for_each_session(
    stack: ExitStack, stop: Fd, placeholder: str
) -> None:
    made = make(stack, stop, command=(*PYTHON, ECHO, placeholder))
    assert isinstance(made, Starter)
    pids = set()
    for _ in range(2):
        with connect(made) as channel:
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
    with connect(made) as channel:
        words = received(channel).decode().split()
    number = words[0].removeprefix("--fd=")
    assert words == [f"--fd={number}", f"x{number}y", "{f}"]


def test_started_back_has_no_other_descriptor_of_ours(
    stack: ExitStack, stop: Fd
) -> None:
    made = make(stack, stop, command=(*PYTHON, HOLDINGS, "{fd}"))
    inherited = stack.enter_context(Fd(os.open("/dev/null", os.O_RDONLY)))
    os.set_inheritable(inherited.fileno(), True)
    with connect(made) as channel:
        fds = [int(word) for word in received(channel).split()]
    assert fds[:3] == [0, 1, 2]
    assert len(fds) == 4


def test_signals_of_the_terminal_are_not_for_the_back(
    stack: ExitStack, stop: Fd
) -> None:
    """It is needed until the rings are drained."""
    made = make(stack, stop, command=(*PYTHON, ECHO, "{fd}"))
    assert isinstance(made, Starter)
    with connect(made):
        assert made.pid is not None
        assert os.getpgid(made.pid) == made.pid
        assert os.getpgid(made.broker.pid) == made.broker.pid


def test_starter_leaves_a_back_time_to_end_by_itself(
    stack: ExitStack, stop: Fd
) -> None:
    made = make(stack, stop, command=(*PYTHON, ECHO, "{fd}"))
    assert isinstance(made, Starter)
    with connect(made) as channel:
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
    monkeypatch.setattr(program, "PATIENCE", 0.05)
    deaf = DEAF.format(handler=handler)
    made = make(stack, stop, command=(*PYTHON, deaf, "{fd}"))
    assert isinstance(made, Starter)
    with connect(made) as channel:
        assert received(channel), "it is up, and has its signal handler"
    made.disconnected()
    assert made.status == status


def test_starter_starts_a_program_that_fails_less_and_less_often(
    stack: ExitStack,
    stop: Fd,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And at once, when it has ended well. Each failure is told."""
    ends = "import os, sys; end = os.read(int(sys.argv[1]), 1); eval(end)"
    made = make(stack, stop, command=(*PYTHON, ends, "{fd}"))
    assert isinstance(made, Starter)
    waits: list[float | None] = []
    monkeypatch.setattr(made, "_wait", waits.append)

    def fail(how: bytes) -> None:
        with connect(made) as channel:
            os.write(channel.fileno(), how)
            assert hung_up(channel)
        made.disconnected()

    for i in range(9):
        fail(b"x")  # NameError
        assert made.status == 1
        assert made.pause == min(connector.PAUSE * 2**i, 5.0)
    with pytest.raises(BackLost, match=r"has failed, and is started again in \d\.\d s"):
        made.connect(time.monotonic())
    waits.clear()
    fail(b"0")
    assert made.status == 0
    (wait,) = waits
    assert wait is not None
    assert 0 < wait <= 5.0
    fail(b"x")
    assert len(waits) == 1
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 10
    assert all(line.endswith("ended: status 1") for line in lines)


def test_starter_does_not_wait_for_a_back_when_we_are_told_to_stop(
    stack: ExitStack, stop: Fd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither before it is waited for nor meanwhile; the broker sees to its end."""
    monkeypatch.setattr(broker, "GRACE", 3600)
    deaf = DEAF.format(handler="signal.SIG_DFL")
    for delay in (0, 0.1):
        made = make(stack, stop, command=(*PYTHON, deaf, "{fd}"))
        assert isinstance(made, Starter)
        with connect(made) as channel:
            assert received(channel)
            pid = made.pid
        assert pid is not None
        timer = threading.Timer(delay, notify, [stop])
        timer.start()
        if not delay:
            timer.join()
        made.disconnected()
        made.broker.close()
        assert made.status is None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert drain(stop), "it is for others as well"


FAMILY = """
import os, signal, socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
if os.fork() == 0:
    signal.signal(signal.SIGTERM, {handler})
    sock.send(str(os.getpid()).encode())
    while True:
        signal.pause()
sock.recv(1)
"""
"""A back-end that leaves a process behind when it ends with its connection."""


@pytest.mark.parametrize("handler", ["signal.SIG_DFL", "signal.SIG_IGN"])
def test_what_a_back_has_started_ends_with_it(
    stack: ExitStack, stop: Fd, monkeypatch: pytest.MonkeyPatch, handler: str
) -> None:
    monkeypatch.setattr(program, "PATIENCE", 0.1)
    family = FAMILY.format(handler=handler)
    made = make(stack, stop, command=(*PYTHON, family, "{fd}"))
    assert isinstance(made, Starter)
    with connect(made) as channel:
        left = int(received(channel))
    made.disconnected()
    assert made.status == 0
    wait_until(lambda: ended(left), "it has ended too")


def ended(pid: int) -> bool:
    """The process that inherits an orphan may be slow to wait for it."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(
    "command", [("back",), ("back", "{fd}", "{listen-fd}"), ("back", "{FD}")]
)
def test_starter_needs_a_place_for_the_number(
    stop: Fd, command: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError, match=r"either \{fd\} or \{listen-fd\}"):
        require(ProcessConfig(command=command), stop)


def test_starter_needs_a_program(stop: Fd, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("text")
    for name, trouble in (
        ("/no/such/program", "there is no program /no/such/program"),
        ("no-such-program", "there is no program no-such-program"),
        (str(plain), f"{plain} is no file that may be executed"),
    ):
        with pytest.raises(StartError, match=f"no back-end: {trouble}"):
            require(ProcessConfig(command=(name, "{fd}")), stop)


def test_starter_says_when_a_program_does_not_start(
    stack: ExitStack, stop: Fd, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    program.write_text("no script and no binary")
    program.chmod(0o755)
    for placeholder in ("{fd}", "{listen-fd}"):
        made = make(stack, stop, command=(str(program), placeholder))
        with pytest.raises(
            SessionError, match=f"back-end: can't start {program}: it is neither"
        ):
            connect(made)
        made.disconnected()


@pytest.mark.parametrize("placeholder", ["{fd}", "{listen-fd}"])
def test_back_that_ends_at_once_is_a_closed_connection(
    stack: ExitStack, stop: Fd, placeholder: str
) -> None:
    made = make(stack, stop, command=("true", placeholder))
    with (
        connect(made) as channel,
        pytest.raises(Disconnected, match="back-end: closed the connection"),
    ):
        channel.recv()
    made.disconnected()


def test_back_goes_with_the_broker(stack: ExitStack, stop: Fd) -> None:
    """Though nobody told it to end, as when the airlock was killed."""
    deaf = DEAF.format(handler="signal.SIG_DFL")
    made = make(stack, stop, command=(*PYTHON, deaf, "{fd}"))
    assert isinstance(made, Starter)
    with connect(made) as channel:
        assert received(channel)
        pid = made.pid
        assert pid is not None
        made.broker.close()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# The broker.


def test_signals_to_all_are_not_for_the_broker(stack: ExitStack, stop: Fd) -> None:
    """A service manager sends them to every process of the service."""
    made = make(stack, stop, command=(*PYTHON, ECHO, "{fd}"))
    connect(made).close()
    made.disconnected()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(made.broker.pid, number)
    with connect(made) as channel:
        assert_echoes(channel)


def test_broker_takes_no_arguments(stack: ExitStack, stop: Fd, tmp_path: Path) -> None:
    """It has one path for each side, or one command, and is told when."""
    other = listening(str(tmp_path / "other"), stack)
    other.setblocking(False)
    wanted = tmp_path / "made"
    for options in ({"command": (*PYTHON, ECHO, "{fd}")}, {"backend": str(wanted)}):
        made = make(stack, stop, **options)
        for request in (
            b"start touch %s" % bytes(wanted),
            b"back %s/other" % bytes(tmp_path),
            b"back\0%s/other" % bytes(tmp_path),
            b"front",
            b"next back",
            b"next end",
            b"adopt",
            b"unlink %s/other" % bytes(tmp_path),
            b"x" * 4000,
        ):
            made.broker._ask(request)
            assert made.broker._answer() == (
                None,
                "this is nothing that the broker does",
            )
    assert not wanted.exists()
    assert (tmp_path / "other").is_socket()
    with pytest.raises(BlockingIOError):
        other.accept()


def test_broker_takes_the_next_back_end_from_its_owner_alone(
    stack: ExitStack, stop: Fd, path: str, tmp_path: Path
) -> None:
    """The airlock can only say whether it takes it."""
    back, following, other = (
        listening(str(tmp_path / name), stack)
        for name in ("back.sock", "next.sock", "other.sock")
    )
    for sock in (back, following, other):
        sock.setblocking(False)
    helper = Broker(stop, back=path)
    stack.callback(helper.close)
    place = str(tmp_path / "control.sock")
    orders, readers = helper.control(helper.listen(place, None, OWNER, KIND))
    stack.callback(orders.close)
    stack.callback(readers.close)
    helper.start()
    for adopts in (False, True):
        with socket.socket(socket.AF_UNIX, KIND) as peer:
            peer.settimeout(10)
            peer.connect(place)
            peer.send(b'{"do": "swap", "backend": "%s/next.sock"}' % bytes(tmp_path))
            orders.settimeout(10)
            assert orders.recv(1000)
            for request in (
                b"next back %s/other.sock" % bytes(tmp_path),
                b"next",
                b"next next back",
                b"next front",
                b"next adopt",
                b"adopt %s/other.sock" % bytes(tmp_path),
            ):
                helper._ask(request)
                assert helper._answer() == (
                    None,
                    "this is nothing that the broker does",
                )
            for chosen, accepts in ((False, back), (True, following)):
                reached, _ = helper.connect_back(following=chosen)
                assert reached is not None
                reached.close()
                accepts.accept()[0].close()
            if adopts:
                helper.adopt_back()
            orders.send(b"+done")
            assert peer.recv(100) == b'{"result": "done"}\n'
        assert helper.connect_back(following=True) == (
            None,
            "this is nothing that the broker does",
        )
        reached, _ = helper.connect_back()
        assert reached is not None
        reached.close()
        (following if adopts else back).accept()[0].close()
    with pytest.raises(BlockingIOError):
        other.accept()


def test_broker_removes_what_was_entrusted_to_it_and_nothing_else(
    stop: Fd, tmp_path: Path
) -> None:
    names = ["removed", "replaced", "gone", "beside"]
    listeners = {name: Listener(str(tmp_path / name)) for name in names}
    helper = Broker(stop)
    for name in names[:3]:
        helper.entrust(listeners[name])
    helper.start()
    for name in names[1:3]:
        (tmp_path / name).unlink()
    with ExitStack() as stack:
        listening(str(tmp_path / "replaced"), stack)
        for name in names[:3]:
            listeners[name].close()
        assert (tmp_path / "removed").exists(), "until the broker ends"
        helper.close()
        left = {path.name for path in tmp_path.iterdir() if path.is_socket()}
        assert left == {"replaced", "beside"}
    listeners["beside"].close()


def test_broker_connects_to_the_front(stack: ExitStack, stop: Fd, path: str) -> None:
    helper = Broker(stop, front=path)
    stack.callback(helper.close)
    helper.start()
    assert helper.connect_front() == (None, "No such file or directory")
    front = listening(path, stack)
    sock, _ = helper.connect_front()
    assert sock is not None
    with sock, front.accept()[0] as accepted:
        sock.send(b"hello")
        assert accepted.recv(10) == b"hello"


def test_want_of_descriptors_makes_no_connection(
    stack: ExitStack, stop: Fd, path: str
) -> None:
    back = listening(path, stack)
    back.setblocking(False)
    made = make(stack, stop, backend=path)
    with no_more_fds(), pytest.raises(OSError, match="Too many open files"):
        connect(made)
    with pytest.raises(BlockingIOError):
        back.accept()
    connect(made).close()


def test_want_of_descriptors_does_not_keep_a_back_from_ending(
    stack: ExitStack, stop: Fd
) -> None:
    made = make(stack, stop, command=(*PYTHON, ECHO, "{fd}"))
    assert isinstance(made, Starter)
    connect(made).close()
    with no_more_fds():
        made.disconnected()
    assert made.status == 0


def test_broker_may_be_lost(stack: ExitStack, stop: Fd) -> None:
    """A connection that is there goes on; no others can be made."""
    made = make(stack, stop, command=(*PYTHON, ECHO, "{fd}"))
    assert isinstance(made, Starter)
    with connect(made) as channel:
        os.kill(made.broker.pid, signal.SIGKILL)
        assert_echoes(channel)
    made.disconnected()
    assert made.status is None
    for _ in range(2):
        with pytest.raises(AirlockError, match="the broker is gone"):
            connect(made)
