# SPDX-License-Identifier: Apache-2.0
"""The service manager's protocols: which sockets are for which side, and its news."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.tables import each_row
from vhost_airlock.errors import StartError
from vhost_airlock.process.manager import Manager, take_sockets

ME = str(os.getpid())


def environ(count: str, names: str | None, process: str = ME) -> dict[str, str]:
    given = {"LISTEN_PID": process, "LISTEN_FDS": count, "PATH": "/bin"}
    return given if names is None else {**given, "LISTEN_FDNAMES": names}


SOCKETS: list[tuple[dict[str, str], dict[str, int]]] = [
    ({"PATH": "/bin"}, {}),
    ({"PATH": "/bin", "LISTEN_FDS": "2"}, {}),
    ({"PATH": "/bin", "LISTEN_PID": ME}, {}),
    (environ("0", None), {}),
    (environ("0", ""), {}),
    (environ("1", None), {"front": 3}),
    (environ("1", ""), {"front": 3}),
    (environ("1", "unknown"), {"front": 3}),
    (environ("1", "vhost-airlock@disk.socket"), {"front": 3}),
    (environ("1", "front"), {"front": 3}),
    (environ("1", "back"), {"back": 3}),
    (environ("3", "stats:back:front"), {"stats": 3, "back": 4, "front": 5}),
    (environ("2", "stats:disk"), {"stats": 3, "front": 4}),
    (environ("2", "front:back", process="1"), {}),
]


@each_row(SOCKETS)
def test_sockets_go_to_the_sides_that_their_names_say(
    variables: dict[str, str], sockets: dict[str, int]
) -> None:
    assert take_sockets(variables) == sockets
    assert variables == {"PATH": "/bin"}, "nothing is left for a program"


REFUSED: list[tuple[dict[str, str], str]] = [
    (environ("two", None), "LISTEN_FDS=two: no number"),
    (environ("-1", None), "LISTEN_FDS=-1: no number"),
    (environ("9" * 5000, None), "no number"),
    (environ("65", None), "LISTEN_FDS=65: more than 64 sockets"),
    (environ("1", None, process="self"), "LISTEN_PID=self: no number"),
    (environ("2", "front"), "LISTEN_FDNAMES=front: not 2 names"),
    (environ("1", "front:back"), "LISTEN_FDNAMES=front:back: not 1 names"),
    (environ("2", None), r"two sockets for one side \(front\): descriptors 3 and 4"),
    (environ("2", "front:disk"), r"two sockets for one side \(front\)"),
    (environ("3", "back:front:back"), r"\(back\): descriptors 3 and 5"),
]


@each_row(REFUSED)
def test_sockets_that_make_no_sense_are_named(
    variables: dict[str, str], text: str
) -> None:
    with pytest.raises(StartError, match=text):
        take_sockets(variables)


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[str, socket.socket]]:
    """A service manager's address, as NOTIFY_SOCKET has it, and its socket."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@{tmp_path}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address.replace("@", "\0"))
        sock.setblocking(False)
        yield address, sock


def test_news_are_datagrams(manager: tuple[str, socket.socket]) -> None:
    address, sock = manager
    told = Manager(address)
    told.tell("READY=1", "STATUS=waiting")
    told.tell("STOPPING=1")
    assert (sock.recv(99), sock.recv(99)) == (b"READY=1\nSTATUS=waiting", b"STOPPING=1")
    told.close()


def test_manager_that_does_not_listen_holds_up_nothing(
    manager: tuple[str, socket.socket],
) -> None:
    address, sock = manager
    told = Manager(address)
    for _ in range(10_000):
        told.tell("STATUS=waiting")  # there is no room left long before
    assert sock.recv(99) == b"STATUS=waiting"
    sock.close()
    told.tell("STATUS=waiting")
    told.close()


def test_without_a_manager_nothing_is_told() -> None:
    told = Manager(None)
    told.tell("READY=1")
    told.close()


@pytest.mark.parametrize("address", ["", "/nowhere/notify", "vsock:2:99", "@" * 200])
def test_manager_that_can_not_be_reached_is_told_of(
    caplog: pytest.LogCaptureFixture, address: str
) -> None:
    told = Manager(address)
    told.tell("READY=1")
    told.close()
    (record,) = caplog.records
    assert f"NOTIFY_SOCKET={address}: " in record.getMessage()
