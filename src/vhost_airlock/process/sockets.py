# SPDX-License-Identifier: Apache-2.0
"""Unix sockets to listen on: made, and cleaned away, without harm to anybody else's."""

from __future__ import annotations

import contextlib
import os
import socket
import stat

from ..errors import StartError


class Listener:
    """A listening socket at a path, which only its owner can connect to.

    A stale socket, one that nobody listens on, is replaced. One that is in use, and
    anything else at that path, is left alone: StartError. close() removes the path.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        if not path:
            raise StartError("can't listen at : no path")  # Linux would make one up
        _remove_stale(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            self.socket.bind(path)
            self.socket.listen(1)
        except OSError as error:
            self.socket.close()
            raise StartError(f"can't listen at {path}: {_reason(error)}") from None
        finally:
            os.umask(mask)
        self._inode = os.stat(path).st_ino

    def fileno(self) -> int:
        return self.socket.fileno()

    def accept(self) -> socket.socket:
        return self.socket.accept()[0]

    def close(self) -> None:
        """Stop listening, and remove the path if it is still ours."""
        self.socket.close()
        with contextlib.suppress(OSError):
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)


def require_socket(path: str) -> None:
    """Raise StartError unless there is a socket at this path."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise StartError(f"no back-end at {path}: {_reason(error)}") from None
    if not stat.S_ISSOCK(mode):
        raise StartError(f"no back-end at {path}: it is no socket")


def inherited(fd: int) -> tuple[socket.socket, bool]:
    """Return the stream socket behind a number that we were given; does it listen?"""
    try:
        sock = socket.socket(fileno=fd)
    except (OSError, ValueError, OverflowError) as error:
        raise StartError(f"descriptor {fd}: {_reason(error)}") from None
    listens = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    trouble = ""
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        trouble = "is no unix stream socket"
    elif not listens and not _connected(sock):
        trouble = "neither listens nor is connected"
    if trouble:
        sock.detach()
        raise StartError(f"descriptor {fd} {trouble}")
    os.set_inheritable(fd, False)
    return sock, listens


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
        raise StartError(f"can't listen at {path}: {_reason(error)}") from None
    if not stat.S_ISSOCK(mode):
        raise StartError(f"can't listen at {path}: it is there and no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            raise StartError(f"can't listen at {path}: {_reason(error)}") from None
    raise StartError(f"can't listen at {path}: another process does")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
