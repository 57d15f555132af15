# SPDX-License-Identifier: Apache-2.0
"""Memory whose pages do not come, as of a file on a file system that hangs."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vhost_airlock.vhost.fds import Fd

SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
"""The number of the system call, by machine."""
USER_MODE_ONLY = 1
FLAGS = USER_MODE_ONLY | os.O_CLOEXEC | os.O_NONBLOCK
API = 0xAA
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
MISSING = 1


@contextmanager
def hung(address: int, size: int) -> Iterator[Fd]:
    """A thread that touches a page there that does not exist yet waits until this ends.

    The descriptor is readable as soon as a thread waits. A signal interrupts a wait,
    but the page is touched again after it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    number = libc.syscall(SYS_USERFAULTFD[os.uname().machine], FLAGS)
    if number < 0:
        pytest.skip(f"userfaultfd: {errno.errorcode[ctypes.get_errno()]}")
    with Fd(number) as fd:
        fcntl.ioctl(fd, UFFDIO_API, bytearray(struct.pack("<QQQ", API, 0, 0)))
        wanted = bytearray(struct.pack("<QQQQ", address, size, MISSING, 0))
        fcntl.ioctl(fd, UFFDIO_REGISTER, wanted)
        yield fd
