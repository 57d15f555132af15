# SPDX-License-Identifier: Apache-2.0
"""File descriptors that are closed exactly once.

Descriptors reach us from peers that we don't trust, at times that they choose. So a
number is wrapped in an `Fd` the moment it arrives, and from then on has one owner:

- A received message owns its descriptors and closes those that are left in it.
- A handler that keeps a descriptor takes the `Fd` out of the message's list, or the
  bare number with `release()` if another owner (an mmap, the data plane) will close it.
- Sending borrows: the sender still owns the descriptors that it passed on.

An `Fd` that was never closed is a bug. The garbage collector closes it nevertheless,
with a ResourceWarning, which the tests turn into a failure.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterable
from typing import Protocol, Self


class HasFileno(Protocol):
    """An object that has a descriptor: an `Fd`, a socket, a file."""

    def fileno(self) -> int: ...


class Fd:
    """One open file descriptor, and the duty to close it."""

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        if number < 0:
            raise ValueError(f"{number} is not a file descriptor")
        self._number = number

    @classmethod
    def dup(cls, other: int | HasFileno) -> Self:
        """Own a copy of a descriptor that another owner will close."""
        return cls(os.dup(number_of(other)))

    def fileno(self) -> int:
        """Return the number, which this `Fd` still owns; ValueError if it's closed."""
        if self._number < 0:
            raise ValueError("the file descriptor is closed")
        return self._number

    @property
    def closed(self) -> bool:
        return self._number < 0

    def release(self) -> int:
        """Give up the descriptor: the caller closes the number that this returns."""
        number, self._number = self.fileno(), -1
        return number

    def close(self) -> None:
        """Close the descriptor; does nothing when it's closed or released."""
        number, self._number = self._number, -1
        if number >= 0:
            # Linux frees the number whatever close() returns (a late EIO, for
            # instance), so a retry could close another owner's descriptor.
            with contextlib.suppress(OSError):
                os.close(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_number", -1) >= 0:
            warnings.warn(
                f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self
            )
            self.close()

    def __repr__(self) -> str:
        return f"Fd({self._number})" if self._number >= 0 else "Fd(closed)"


def number_of(fd: int | HasFileno) -> int:
    """Return the number of a descriptor, or of an object that has one."""
    return fd if isinstance(fd, int) else fd.fileno()


def close_all(fds: Iterable[Fd]) -> None:
    """Close every one of them."""
    for fd in fds:
        fd.close()


def eventfd(count: int = 0) -> Fd:
    """Make an eventfd whose reads and writes don't block."""
    return Fd(os.eventfd(count, os.EFD_CLOEXEC | os.EFD_NONBLOCK))


def notify(fd: int | HasFileno) -> None:
    """Add one to an eventfd's count.

    A full count stays as it is: the reader that waits for it is woken either way.
    """
    with contextlib.suppress(BlockingIOError):
        os.eventfd_write(number_of(fd), 1)


def drain(fd: int | HasFileno) -> int:
    """Return an eventfd's count and set it to 0, without ever waiting.

    All holders of an eventfd share the flag O_NONBLOCK, and a peer can clear it. So
    each read has a flag of its own not to wait.
    """
    count = bytearray(8)
    try:
        os.preadv(number_of(fd), [count], -1, os.RWF_NOWAIT)
    except BlockingIOError:
        return 0
    return int.from_bytes(count, sys.byteorder)
