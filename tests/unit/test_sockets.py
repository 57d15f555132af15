# SPDX-License-Identifier: Apache-2.0
"""Sockets to listen on: made without harm to anybody else's, and cleaned away."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vhost_airlock.errors import StartError
from vhost_airlock.process.sockets import (
    OWNER,
    Group,
    Listener,
    Peer,
    Rights,
    address_of,
    inherited,
    peer_of,
    require_socket,
)
from vhost_airlock.record import replaced


def bound(path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(str(path))
    return sock


def listening(path: Path, backlog: int = 1) -> socket.socket:
    sock = bound(path)
    sock.listen(backlog)
    return sock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "front.sock"


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _nothing_is_left_open() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


def test_who_connects_is_accepted(path: Path) -> None:
    listener = Listener(str(path))
    with socket.socket(socket.AF_UNIX) as front:
        front.connect(str(path))
        with listener.accept() as accepted:
            front.send(b"hello")
            assert accepted.recv(10) == b"hello"
    listener.close()
    assert not path.exists()
    listener.close()


def test_peer_is_the_process_that_connected(path: Path) -> None:
    """Each end is told the numbers of the process at the other end."""
    listener = Listener(str(path))
    me = Peer(os.getpid(), os.geteuid(), os.getegid())
    child = os.fork()
    if child == 0:
        with socket.socket(socket.AF_UNIX) as front:
            front.connect(str(path))
            os._exit(0 if peer_of(front) == me else 1)
    with listener.accept() as accepted:
        assert peer_of(accepted) == replaced(me, pid=child)
    assert os.waitpid(child, 0)[1] == 0
    listener.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_peer_of_another_user_is_its_effective_user() -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # the kernel makes up an address that any user may connect to
        listener.listen()
        child = os.fork()
        if child == 0:
            with socket.socket(socket.AF_UNIX) as front:
                os.setresgid(0, 5353, 0)
                os.setresuid(0, 4242, 0)
                front.connect(listener.getsockname())
                os._exit(0)
        with listener.accept()[0] as accepted:
            assert peer_of(accepted) == Peer(child, 4242, 5353)
        assert os.waitpid(child, 0)[1] == 0


ANOTHER = Group("others", 5353 if os.geteuid() == 0 else os.getgid())
"""A group that a socket can be given."""
RIGHTS = [OWNER, Rights(0o660), Rights(0o600, ANOTHER), Rights(0o666, ANOTHER)]


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
        assert os.umask(mask) == mask, "the umask is as it was"
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0, 0o022, 0o777], ids=oct)
@pytest.mark.parametrize("rights", RIGHTS, ids=str)
def test_socket_has_the_rights_that_were_asked_for(
    path: Path, rights: Rights, mask: int
) -> None:
    with umask(mask):
        listener = Listener(str(path), rights)
    found = path.stat()
    assert stat.S_IMODE(found.st_mode) == rights.mode
    if rights.group is not None:
        assert found.st_gid == rights.group.number
    listener.close()
    assert not path.exists(), "it is known by its inode, whatever its rights"


def test_rights_are_never_wider_than_asked_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two steps the owner alone has rights, and nobody can connect."""
    seen = []

    def looking(name: str) -> None:
        call = getattr(os, name)

        def look(*arguments: Any) -> None:
            found = path.stat()
            front = socket.socket(socket.AF_UNIX)
            with front, pytest.raises(ConnectionRefusedError):
                front.connect(str(path))
            seen.append((name, stat.S_IMODE(found.st_mode), found.st_gid))
            call(*arguments)

        monkeypatch.setattr(os, name, look)

    looking("chown")
    looking("chmod")
    with umask(0):
        Listener(str(path), Rights(0o666, ANOTHER)).close()
    assert seen == [("chown", 0o600, os.getgid()), ("chmod", 0o600, ANOTHER.number)]


def test_acl_of_the_folder_widens_nothing(path: Path) -> None:
    """Where a folder has a default ACL, the kernel does not look at the umask."""
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, 7, number)
        for tag, number in ((1, 2**32 - 1), (2, 4242), (4, 2**32 - 1))
    )
    acl += struct.pack("<HHIHHI", 0x10, 7, 2**32 - 1, 0x20, 7, 2**32 - 1)
    try:
        os.setxattr(path.parent, "system.posix_acl_default", acl)
    except OSError as error:
        pytest.skip(f"{path.parent}: {error.strerror}")
    listener = Listener(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    listener.close()


@pytest.mark.parametrize("taken_by", ["a file", "a link"])
def test_rights_come_to_no_other_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, taken_by: str
) -> None:
    """A file has taken the path by the time that rights are given."""
    precious = path.with_suffix(".file")
    precious.write_text("precious")
    precious.chmod(0o600)
    opened = os.open

    def swap(name: str, flags: int) -> int:
        path.unlink()
        if taken_by == "a link":
            path.symlink_to(precious)
        else:
            path.hardlink_to(precious)
        return opened(name, flags)

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(StartError, match=f"{path}: another file has taken the path"):
        Listener(str(path), Rights(0o666))
    assert stat.S_IMODE(precious.stat().st_mode) == 0o600
    assert path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_group_of_others_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.parent.chmod(0o777)
    monkeypatch.chdir(path.parent)
    told, telling = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setresgid(4242, 4242, 4242)
        os.setresuid(4242, 4242, 4242)
        try:
            Listener(path.name, Rights(0o660, Group("kvm", 5353)))
        except StartError as error:
            os.write(telling, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(told, 999).decode() == (
        "can't listen at front.sock: --socket-group kvm:"
        " the airlock's user is no member of this group"
    )
    assert not path.exists()
    os.close(told)
    os.close(telling)


def test_stale_socket_is_replaced(path: Path) -> None:
    listening(path).close()
    assert path.is_socket()
    listener = Listener(str(path))
    with socket.socket(socket.AF_UNIX) as front:
        front.connect(str(path))
    listener.close()


def test_stale_socket_that_never_listened_is_replaced(path: Path) -> None:
    bound(path).close()
    Listener(str(path)).close()


def test_socket_in_use_is_left_alone(path: Path) -> None:
    with listening(path, 5) as other:
        with pytest.raises(StartError, match=f"can't listen at {path}: another proc"):
            Listener(str(path))
        assert path.is_socket()
        with socket.socket(socket.AF_UNIX) as front:
            front.connect(str(path))
            with other.accept()[0] as served:
                front.send(b"x")
                assert served.recv(1) == b"x"


@pytest.mark.parametrize(
    "kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM]
)
def test_socket_of_any_kind_that_does_not_listen_yet_is_left_alone(
    path: Path, kind: socket.SocketKind
) -> None:
    with bound(path, kind):
        with pytest.raises(StartError, match=f"can't listen at {path}: another proc"):
            Listener(str(path))
        assert path.is_socket()


def make_file(path: Path) -> None:
    path.write_text("precious")


def make_link_to_file(path: Path) -> None:
    path.with_suffix(".file").write_text("precious")
    path.symlink_to(path.with_suffix(".file"))


def make_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_suffix(".nowhere"))


@pytest.mark.parametrize(
    "make",
    [make_file, make_link_to_file, make_dangling_link, Path.mkdir, os.mkfifo],
)
def test_anything_else_is_left_alone(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    before = path.lstat()
    with pytest.raises(StartError, match=f"can't listen at {path}: .* no socket"):
        Listener(str(path))
    assert path.lstat() == before


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/nowhere/at/all.sock", "No such file or directory"),
        ("/dev/null/front.sock", "Not a directory"),
        ("/proc/front.sock", "No such file|Permission denied"),
        ("/tmp/" + "long" * 30, "path too long"),
        ("", "no path"),
    ],
)
def test_place_where_no_socket_can_be_is_named(path: str, reason: str) -> None:
    with pytest.raises(StartError, match=f"can't listen at {path}: .*({reason})"):
        Listener(path)


def test_path_of_somebody_else_is_not_removed(path: Path) -> None:
    """It was taken over meanwhile, by whatever means."""
    listener = Listener(str(path))
    path.unlink()
    with listening(path):
        listener.close()
        assert path.is_socket()


def test_path_of_a_successor_with_the_same_inode_is_not_removed(path: Path) -> None:
    """File systems use numbers of inodes again at once."""
    listener = Listener(str(path))
    os.utime(path, ns=(0, 0))
    listener.close()
    assert path.is_socket()


def test_path_whose_rights_were_changed_is_removed(path: Path) -> None:
    """So that a VMM of another user can connect."""
    listener = Listener(str(path))
    path.chmod(0o666)
    listener.close()
    assert not path.exists()


def test_path_that_is_left_to_somebody_else_is_not_removed(path: Path) -> None:
    listener = Listener(str(path))
    listener.disown()
    listener.close()
    assert path.is_socket()
    listener.file.remove()
    assert not path.exists()


def test_path_that_is_gone_is_no_trouble(path: Path) -> None:
    listener = Listener(str(path))
    path.unlink()
    listener.close()


def test_back_end_must_be_a_socket(path: Path) -> None:
    with pytest.raises(StartError, match=f"no back-end at {path}: No such file"):
        require_socket(str(path))
    with pytest.raises(StartError, match=r"no back-end at : No such file"):
        require_socket("")
    with bound(path):
        require_socket(str(path))
    path.unlink()
    path.write_text("precious")
    with pytest.raises(StartError, match=f"no back-end at {path}: it is no socket"):
        require_socket(str(path))


def test_inherited_socket_that_listens(path: Path) -> None:
    with listening(path) as made:
        os.set_inheritable(made.fileno(), True)
        sock, listens = inherited(made.detach())
        assert listens
        assert not os.get_inheritable(sock.fileno())
        sock.close()


def test_inherited_socket_that_is_connected() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        sock, listens = inherited(ours.detach())
        assert not listens
        theirs.send(b"x")
        assert sock.recv(1) == b"x"
        sock.close()


def test_inherited_socket_of_no_use_is_named(path: Path) -> None:
    ours, theirs = os.pipe()
    datagram, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    network = socket.socket(socket.AF_INET)
    alone = bound(path)
    for fd, reason in (
        (ours, "not a socket|non-socket"),
        (theirs, "not a socket|non-socket"),
        (datagram.fileno(), "no unix stream socket"),
        (network.fileno(), "no unix stream socket"),
        (alone.fileno(), "neither listens nor is connected"),
    ):
        with pytest.raises(StartError, match=f"descriptor {fd}.*({reason})"):
            inherited(fd)
        os.fstat(fd)  # still its owner's
    for each in (datagram, other, network, alone):
        each.close()
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("fd", [-1, 9999, 1 << 31, 1 << 70])
def test_inherited_number_of_nothing_is_named(fd: int) -> None:
    with pytest.raises(StartError, match=f"descriptor {fd}"):
        inherited(fd)


def test_address_of_an_inherited_socket(tmp_path: Path) -> None:
    """It is empty for all that has none; the descriptor stays as it is."""
    path = tmp_path / "there.sock"
    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as nameless,
        socket.socket(socket.AF_INET) as other,
        (tmp_path / "file").open("w") as file,
    ):
        listener.bind(str(path))
        assert address_of(listener.fileno()) == str(path)
        for fd in (nameless.fileno(), other.fileno(), file.fileno(), -1, 9999, 1 << 40):
            assert address_of(fd) == ""
        listener.listen()


def test_peer_is_told_by_its_process_and_user() -> None:
    assert str(Peer(4711, 64055, 108)) == "process 4711, user 64055"
    assert str(Peer(0, 65534, 65534)) == "process of another namespace, user 65534"
