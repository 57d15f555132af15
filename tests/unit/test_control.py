# SPDX-License-Identifier: Apache-2.0
"""The control socket, from the side of a peer and of the airlock; the broker's part."""

from __future__ import annotations

import json
import os
import random
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.backs import wait_until
from vhost_airlock.errors import UsageError
from vhost_airlock.process import control
from vhost_airlock.process.control import DONE, FAILED, KIND, LARGEST, Control
from vhost_airlock.process.reach import Reach
from vhost_airlock.process.sockets import Listener
from vhost_airlock.process.target import Target
from vhost_airlock.vhost.fds import eventfd, notify

BACK = (sys.executable, "-S", "-E", "-c", "import time; time.sleep(3600)", "{fd}")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


class Served:
    """A control socket, served by a thread as the broker does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = Listener(str(path), kind=KIND)
        pairs = [socket.socketpair(socket.AF_UNIX, KIND) for _ in range(2)]
        (self.orders, orders), (self.readers, readers) = pairs
        for sock in (self.orders, self.readers):
            sock.settimeout(10)
        self._sockets = [self.orders, orders, self.readers, readers]
        self.control = Control(self.listener.socket, orders, readers)
        self._stop = eventfd()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            poll = select.poll()
            poll.register(self._stop.fileno(), select.POLLIN)
            self.control.register(poll)
            wait = self.control.wait()
            ready = {fd for fd, _ in poll.poll(None if wait is None else wait * 1000)}
            if self._stop.fileno() in ready:
                return
            self.control.look(ready)

    def connected(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, KIND)
        sock.settimeout(10)
        while True:
            with suppress(BlockingIOError):
                sock.connect(str(self.path))
                return sock

    def ask(self, command: bytes) -> Any:
        with self.connected() as sock:
            sock.send(command)
            return json.loads(sock.recv(2 * LARGEST))

    def close(self) -> None:
        notify(self._stop)
        self._thread.join()
        self._stop.close()
        self.control.close()
        self.listener.close()
        for sock in self._sockets:
            sock.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path / "control.sock")
    yield served
    served.close()


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    """A back-end's socket."""
    where = str(tmp_path / "back.sock")
    with socket.socket(socket.AF_UNIX) as back:
        back.bind(where)
        back.listen(5)
        yield where


def swap(**target: object) -> bytes:
    return json.dumps({"do": "swap", **target}).encode()


def test_order_is_passed_on_and_answered(served: Served, path: str) -> None:
    """The airlock is told the target, and the peer is told the outcome."""
    for answer, told in (
        (DONE + b"swapped", {"result": "swapped"}),
        (FAILED + b"it is another device", {"error": "it is another device"}),
        (b"?" * 100_000, {"error": "?" * (LARGEST - 1)}),
        (DONE + b"\xff\x1b[2J", {"result": "\ufffd\x1b[2J"}),
    ):
        with served.connected() as peer:
            peer.send(swap(backend=path))
            assert json.loads(served.orders.recv(LARGEST)) == {"backend": path}
            assert served.control.next is not None
            served.orders.send(answer)
            assert json.loads(peer.recv(2 * LARGEST)) == told
            assert peer.recv(1) == b""
        wait_until(lambda: served.control.next is None, "it is dropped")


def test_one_at_a_time(served: Served, path: str) -> None:
    with served.connected() as peer:
        peer.send(swap(backend=path))
        assert served.orders.recv(LARGEST)
        other = swap(command=BACK)
        assert served.ask(other) == {"error": "another swap is under way"}
        assert served.control.next is not None
        assert served.control.next.target == Target(path)
        served.orders.send(DONE + b"swapped")
        assert peer.recv(LARGEST)


def test_peer_may_leave_before_the_answer(served: Served, path: str) -> None:
    with served.connected() as peer:
        peer.send(swap(backend=path))
        assert served.orders.recv(LARGEST)
    served.orders.send(DONE + b"swapped")
    assert "error" in served.ask(b"{}")


def test_program_that_is_not_adopted_ends(served: Served) -> None:
    with served.connected() as peer:
        peer.send(swap(command=BACK))
        assert json.loads(served.orders.recv(LARGEST)) == {"command": list(BACK)}
        assert served.control.next is not None
        pid, sock = served.control.next.connect()
        sock.close()
        os.kill(int(pid), 0)
        served.orders.send(FAILED + b"it does not answer")
        assert peer.recv(LARGEST)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_what_is_adopted_stays(served: Served) -> None:
    with served.connected() as peer:
        peer.send(swap(command=BACK))
        assert served.orders.recv(LARGEST)
        adopted = served.control.adopt()
        pid, sock = adopted.connect()
        sock.close()
        served.orders.send(DONE + b"swapped")
        assert peer.recv(LARGEST)
        os.kill(int(pid), 0)
        adopted.close()
        with pytest.raises(OSError, match="nothing that the broker does"):
            served.control.adopt()


@pytest.mark.parametrize("command", [b"", b'{"do": "stats"}'])
def test_readers_of_stats_are_handed_over(served: Served, command: bytes) -> None:
    """Also one that says nothing, as at a socket for stats."""
    with served.connected() as peer:
        if command:
            peer.send(command)
        else:
            peer.shutdown(socket.SHUT_WR)
        word, fds, _, _ = socket.recv_fds(served.readers, 100, 1)
        assert word == b"stats"
        with socket.socket(fileno=fds[0]) as reader:
            reader.send(b"{}")
        assert peer.recv(100) == b"{}"
        assert peer.recv(100) == b""


def test_readers_that_are_not_served_are_told(served: Served) -> None:
    """The thread for stats has too many already. They are never waited for."""
    peers = []
    while True:
        peers.append(served.connected())
        peers[-1].send(b'{"do": "stats"}')
        if select.select([peers[-1]], [], [], 0.05)[0]:
            break
    assert "error" in json.loads(peers[-1].recv(100))
    for peer in peers:
        peer.close()


BAD = [
    (b"x", "a command is a line with a JSON object"),
    (b"[1]", "a command is a line with a JSON object"),
    (b"\xff\xfe\0", "a command is a line with a JSON object"),
    (b"[" * 60000, "a command is a line with a JSON object"),
    (b"9" * 60000, "a command is a line with a JSON object"),
    (b"{" + b" " * LARGEST, f"a command has at most {LARGEST} bytes"),
    (b"{}", "there is no command None"),
    (b'{"do": "stop"}', "there is no command 'stop'"),
    (b'{"do": ["swap"]}', "there is no command ['swap']"),
    (swap(), "a path or a command of a back-end is needed, and no more"),
    (
        swap(backend="/x", command=["x"]),
        "a path or a command of a back-end is needed, and no more",
    ),
    (swap(backend="x"), "the back-end's path does not begin at /: 'x'"),
    (swap(backend=7), "the back-end's path does not begin at /: 7"),
    (swap(backend="/a\0b"), "the back-end's path does not begin at /: '/a\\x00b'"),
    (swap(backend="/" + "x" * 107), "a socket's path has at most 107 bytes"),
    (swap(backend="/none"), "no back-end at /none: No such file or directory"),
    (swap(backend="/dev/null"), "no back-end at /dev/null: it is no socket"),
    (swap(backend="/\ud800"), "the back-end's path does not begin at /:"),
    (swap(command=[]), "the command is no list of 1 to 1024 words"),
    (swap(command="true {fd}"), "the command is no list of 1 to 1024 words"),
    (swap(command=["true", 3]), "the command is no list of 1 to 1024 words"),
    (swap(command=["a\0", "{fd}"]), "the command is no list of 1 to 1024 words"),
    (swap(command=["{fd}"] * 1025), "the command is no list of 1 to 1024 words"),
    (swap(command=["true"]), "must have either {fd} or {listen-fd} in it: true"),
    (swap(command=["/none", "{fd}"]), "no back-end: there is no program /none"),
]


@pytest.mark.parametrize(("command", "reason"), BAD)
def test_bad_command_is_told_why(served: Served, command: bytes, reason: str) -> None:
    answer = served.ask(command)
    assert list(answer) == ["error"]
    assert reason in answer["error"]
    assert len(answer["error"]) < 1000
    served.orders.setblocking(False)
    with pytest.raises(BlockingIOError):
        served.orders.recv(1)


def test_arbitrary_bytes_do_no_harm(served: Served, path: str) -> None:
    rng = random.Random(1)
    good = swap(backend=path)
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with served.connected() as peer:
            peer.send(data[: rng.randint(1, len(data))])
            ready = select.select([peer, served.orders], [], [], 10)[0]
            if served.orders in ready:
                assert served.orders.recv(LARGEST)
                served.orders.send(FAILED + b"no")
            assert json.loads(peer.recv(LARGEST)).keys() == {"error"}


def test_silent_peers_are_left(
    served: Served, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than are served at the same time."""
    monkeypatch.setattr(control, "READ_TIME", 0.05)
    peers = [served.connected() for _ in range(3 * control.MOST_PEERS)]
    assert "error" in served.ask(b"{}")
    for peer in peers:
        assert json.loads(peer.recv(100)) == {"error": "no command came in 0.05 s"}
        peer.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_another_user_is_refused_whatever_the_mode_is(served: Served) -> None:
    os.chmod(served.path, 0o666)
    for above in list(served.path.parents)[:-2]:
        os.chmod(above, 0o755)
    told, telling = os.pipe()
    if os.fork() == 0:
        try:
            os.setresuid(4242, 4242, 4242)
            with served.connected() as peer:
                os.write(telling, peer.recv(1000))
        finally:
            os._exit(0)
    os.wait()
    assert json.loads(os.read(told, 1000)) == {
        "error": "user 4242 may not: only the airlock's own user may"
    }
    os.close(told)
    os.close(telling)


def test_airlock_that_hangs_up_is_not_looked_at_again(served: Served) -> None:
    served.orders.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: served.control._ended, "it is noticed")
    assert "error" in served.ask(b"{}")


TARGETS: list[Callable[[], Target]] = [
    lambda: Target.parse({"backend": "/a b/\udcff"}),
    lambda: Target.parse({"command": ["a", "", "\udcff{fd}"]}),
]


@pytest.mark.parametrize("make", TARGETS)
def test_target_is_the_same_after_it_was_told(make: Callable[[], Target]) -> None:
    """Also with bytes that are no text."""
    target = make()
    assert Target.parse(json.loads(json.dumps(target.told()))) == target


def test_target_is_one_thing() -> None:
    for told in ({}, {"backend": None, "command": None}):
        with pytest.raises(UsageError, match="a path or a command"):
            Target.parse(told)


def test_nothing_is_connected_to_without_a_target() -> None:
    with pytest.raises(OSError, match="this is nothing that the broker does"):
        Reach(Target()).connect()
