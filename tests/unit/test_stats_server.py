# SPDX-License-Identifier: Apache-2.0
"""The thread of the stats: it answers one reader after the other."""

from __future__ import annotations

import gc
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vhost_airlock import __version__
from vhost_airlock.cli.stats_document import ask
from vhost_airlock.process import stats_server
from vhost_airlock.process.sockets import Listener
from vhost_airlock.process.stats_server import KIND, Stats

LARGE = "x" * (8 << 20)
"""More than any socket's buffer holds."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "stats.sock"


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def stats(path: Path, describe: Callable[[], dict[str, object]]) -> Stats:
    return Stats(Listener(str(path), kind=KIND), describe)


def connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(str(path))
    return sock


def test_each_reader_gets_a_document_of_its_moment(path: Path) -> None:
    turns = iter(range(100))
    told = stats(path, lambda: {"turn": next(turns)}).start()
    first, second = (json.loads(ask(str(path))) for _ in range(2))
    told.close()
    assert (first["turn"], second["turn"]) == (0, 1)
    assert first["version"] == second["version"] == __version__
    assert 0 <= first["uptime"] <= second["uptime"]


def test_the_path_goes_away(path: Path) -> None:
    told = stats(path, dict).start()
    told.close()
    assert not path.exists()


def test_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    told = stats(path, dict).start()
    assert json.loads(ask(str(path)))
    told.close()


def test_who_does_not_read_is_left_behind(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats_server, "READ_TIME", 0.05)
    documents = iter([LARGE, LARGE, "short"])
    told = stats(path, lambda: {"text": next(documents)}).start()
    with connected(path), connected(path):
        assert json.loads(ask(str(path)))["text"] == "short"
    told.close()


def test_who_leaves_at_once_does_no_harm(path: Path) -> None:
    documents = iter([LARGE, "short"])
    told = stats(path, lambda: {"text": next(documents)}).start()
    connected(path).close()
    assert json.loads(ask(str(path)))["text"] == "short"
    told.close()


def test_want_of_descriptors_is_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = stats(path, dict).start()
    assert told.listener is not None
    accept = told.listener.accept
    failures = iter([OSError(24, "Too many open files")] * 2)

    def fail_at_first() -> socket.socket:
        for error in failures:
            raise error
        return accept()

    monkeypatch.setattr(told.listener, "accept", fail_at_first)
    assert json.loads(ask(str(path)))
    told.close()


def test_readers_may_be_handed_over(path: Path) -> None:
    """By the broker, which has accepted them; also in place of a listener."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    told = Stats(None, dict, theirs).start()
    for _ in range(3):
        reader, handed = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        handed.setblocking(False)
        with reader:
            with handed:
                socket.send_fds(ours, [b"stats"], [handed.fileno()])
            assert json.loads(reader.recv(1000))["version"] == __version__
            assert reader.recv(1) == b""
    ours.send(b"without one")
    ours.close()
    told.close()
