# SPDX-License-Identifier: Apache-2.0
"""Unix sockets to listen on: made and removed, without harm to those of others.

Also sockets and pipes that the process has inherited.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
import struct
from typing import Self

from ..errors import StartError
from ..record import record
from ..vhost.fds import Fd


@record
class Peer:
    """The process that connected a socket, or listened for it, as it was then.

    0 as `pid` and 65534 as `uid` and `gid` stand for numbers that this process's
    namespaces don't have. The peer of a socket pair is the process that made the pair.
    """

    pid: int
    uid: int
    gid: int

    def __str__(self) -> str:
        return f"process {self.pid or 'of another namespace'}, user {self.uid}"


def peer_of(sock: socket.socket) -> Peer:
    """Return the process at the other end of a connected socket."""
    layout = struct.Struct("iII")  # struct ucred of <sys/socket.h>
    return Peer(
        *layout.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size)
        )
    )


SO_PEERPIDFD = 77
"""Of <asm-generic/socket.h>, since Linux 6.5; the socket module lacks it."""


def pidfd_of(sock: socket.socket) -> Fd | None:
    """Return a pidfd of the process at the other end of a connected socket; None: the
    kernel can't tell.
    """
    with contextlib.suppress(OSError):
        return Fd(sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
    return None


def has_ended(pidfd: Fd) -> bool:
    """Has the process with this pidfd ended?"""
    poll = select.poll()
    poll.register(pidfd.fileno(), select.POLLIN)
    return bool(poll.poll(0))


@record
class Group:
    """A group of users, by the name under which the user gave it."""

    name: str
    number: int


@record
class Rights:
    """The users that may connect to a socket."""

    mode: int = 0o600
    """Of the socket's file; the right to write is the right to connect."""
    group: Group | None = None
    """Of the socket's file; None: the kernel's choice."""


OWNER = Rights()
"""Only the airlock's own user may connect."""


LONGEST_PATH = 107
"""Bytes that the path of a socket can have, see unix(7)."""

KINDS: dict[int, str] = {
    socket.SOCK_STREAM: "stream",
    socket.SOCK_SEQPACKET: "sequential-packet",
}
"""Kinds of sockets that listen, with their names."""


@record
class SocketFile:
    """A socket at a path, with the numbers that tell it from a later one there."""

    path: str
    device: int
    inode: int
    modified: int
    """Time when it was made, in nanoseconds: numbers of inodes are used again."""

    @classmethod
    def at(cls, path: str) -> Self:
        """Return the file at this path now. OSError if there is none."""
        found = os.lstat(path)
        return cls(path, found.st_dev, found.st_ino, found.st_mtime_ns)

    def remove(self) -> None:
        """Remove it, if it is still there."""
        with contextlib.suppress(OSError):
            if SocketFile.at(self.path) == self:
                os.unlink(self.path)


class ListeningSocket:
    """A socket that listens, and that another process has made."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.path = os.fsdecode(sock.getsockname())
        """Its address, for messages."""

    def fileno(self) -> int:
        return self.socket.fileno()

    def accept(self) -> socket.socket:
        return self.socket.accept()[0]

    def close(self) -> None:
        """Close the socket. Its path is its maker's."""
        self.socket.close()


class Listener(ListeningSocket):
    """A listening socket at a path, to which the users with these rights can connect.

    A stale socket, on which no process listens, is replaced. A socket that is in use,
    or another file at that path, is left alone: StartError. close() removes the path,
    unless disown() was called.
    """

    def __init__(
        self, path: str, rights: Rights = OWNER, kind: int = socket.SOCK_STREAM
    ) -> None:
        if not path:
            raise StartError("can't listen at : no path")  # Linux would make one up
        _remove_stale(path)
        sock = socket.socket(socket.AF_UNIX, kind)
        try:
            self.file = _bind(sock, path, rights)
            sock.listen(1)
        except OSError as error:
            sock.close()
            raise StartError(f"can't listen at {path}: {reason_of(error)}") from None
        super().__init__(sock)
        self._owned = True

    def close(self) -> None:
        """Stop listening, and remove the path if it is still ours."""
        super().close()
        if self._owned:
            self.file.remove()

    def disown(self) -> None:
        """Leave it to the broker to remove the path."""
        self._owned = False


def _bind(sock: socket.socket, path: str, rights: Rights) -> SocketFile:
    """Bind a socket to a path; returns its file, with these rights. OSError otherwise.

    Until it has its group it is for its owner alone, and until it listens no process
    can connect, whatever its rights. They are set by descriptor, so that they don't
    come to another file that has taken the path meanwhile.
    """
    os.fchmod(sock.fileno(), OWNER.mode)  # bind() gives the file this mode
    sock.bind(path)
    file = SocketFile.at(path)
    try:
        with Fd(os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
            mode = os.fstat(fd.fileno()).st_mode
            if not stat.S_ISSOCK(mode):
                raise OSError("another file has taken the path")
            same = f"/proc/self/fd/{fd.fileno()}"
            if rights.group is not None:
                _give(same, rights.group)
            if stat.S_IMODE(mode) != rights.mode:
                os.chmod(same, rights.mode)
    except OSError:
        file.remove()
        raise
    return file


def _give(path: str, group: Group) -> None:
    try:
        os.chown(path, -1, group.number)
    except OSError as error:
        reason = reason_of(error)
        if error.errno == errno.EPERM:
            reason = "the airlock's user is no member of this group"
        trouble = f"--socket-group {group.name}: {reason}"
        raise OSError(error.errno, trouble) from None


def require_socket(path: str, *, may_come: bool = False) -> str:
    """Raise StartError unless there is a socket at this path.

    Returns "", or if one may come later and nothing is there yet, the reason.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        trouble = f"no back-end at {path}: {reason_of(error)}"
        if may_come and path and isinstance(error, FileNotFoundError):
            return trouble
        raise StartError(trouble) from None
    if not stat.S_ISSOCK(mode):
        raise StartError(f"no back-end at {path}: it is no socket")
    return ""


def inherited(fd: int, kind: int = socket.SOCK_STREAM) -> tuple[socket.socket, bool]:
    """Return (the socket with this inherited number, does it listen?)."""
    try:
        sock = socket.socket(fileno=fd)
    except (OSError, ValueError, OverflowError) as error:
        raise StartError(f"descriptor {fd}: {reason_of(error)}") from None
    listens = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    trouble = ""
    if sock.family != socket.AF_UNIX or sock.type != kind:
        trouble = f"is no unix {KINDS[kind]} socket"
    elif not listens and not _connected(sock):
        trouble = "neither listens nor is connected"
    if trouble:
        sock.detach()
        raise StartError(f"descriptor {fd} {trouble}")
    os.set_inheritable(fd, False)
    return sock, listens


def inherited_pipe(fd: int) -> Fd:
    """Return the reading end of a pipe that has this inherited number."""
    try:
        is_pipe = stat.S_ISFIFO(os.fstat(fd).st_mode)
        writes = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    except (OSError, OverflowError) as error:
        raise StartError(f"descriptor {fd}: {reason_of(error)}") from None
    if not is_pipe or writes:
        raise StartError(f"descriptor {fd} is no reading end of a pipe")
    os.set_inheritable(fd, False)
    return Fd(fd)


def listens(fd: int) -> bool:
    """Is this the number of a socket that listens?"""
    with (
        contextlib.suppress(OSError, OverflowError),
        Fd(os.dup(fd)) as own,
        socket.socket(fileno=own.fileno()) as sock,
    ):
        own.release()
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    return False


def address_of(fd: int) -> str:
    """Return the address of a unix socket; "" if it has none, or is none."""
    with (
        contextlib.suppress(OSError, OverflowError, TypeError),
        Fd(os.dup(fd)) as own,
        socket.socket(fileno=own.fileno()) as sock,
    ):
        own.release()
        return os.fsdecode(sock.getsockname())
    return ""


def _connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise StartError(f"can't listen at {path}: {reason_of(error)}") from None
    if not stat.S_ISSOCK(mode):
        raise StartError(f"can't listen at {path}: it is there and no socket")
    # A datagram socket can't connect to a stream, and the server there notices nothing.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                reason = reason_of(error)
                raise StartError(f"can't listen at {path}: {reason}") from None
    raise StartError(f"can't listen at {path}: another process does")


def reason_of(error: Exception) -> str:
    """Return the system's text for an error."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
