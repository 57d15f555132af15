# SPDX-License-Identifier: Apache-2.0
"""Landlock: which files the process may still do what with (landlock(7)).

The C library has no functions for it, so these are bare system calls. A right that
the ruleset handles is denied wherever no rule grants it; one that the kernel does not
know yet must not be in the ruleset.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable

from ..vhost.fds import Fd

REMOVE_FILE = 1 << 5
"""The right to remove files, and sockets."""

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION = 1
_PATH_BENEATH = 1

_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
"""From which version of Landlock on there are so many rights for files."""
_NETWORK = (4, 0b11)
"""From version 4 on: to bind and to connect TCP sockets."""
_SCOPES = (6, 0b11)
"""From version 6 on: abstract sockets and signals of processes outside."""


def version() -> int:
    """Return which version of Landlock the kernel has; 0: none, or none for us."""
    try:
        return _call(_CREATE_RULESET, None, 0, _ASK_VERSION)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return 0
        raise


def restrict_files(folders: Iterable[str]) -> bool:
    """Deny this thread all that can be denied, save removing what is in these folders.

    False: there is no Landlock. The thread must have no_new_privs.
    """
    abi = version()
    if not abi:
        return False
    attributes = handled(abi)
    with Fd(_call(_CREATE_RULESET, attributes, len(attributes), 0)) as ruleset:
        for folder in folders:
            with Fd(os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
                rule = struct.pack("=Qi", REMOVE_FILE, fd.fileno())
                _call(_ADD_RULE, ruleset.fileno(), _PATH_BENEATH, rule, 0)
        _call(_RESTRICT_SELF, ruleset.fileno(), 0)
    return True


def handled(abi: int) -> bytes:
    """The attributes of a ruleset that denies whatever this version can deny."""
    rights = max(count for since, count in _FILE_RIGHTS.items() if since <= abi)
    network, scopes = (
        bits if since <= abi else 0 for since, bits in (_NETWORK, _SCOPES)
    )
    # Kernels that know only a part of it want the rest to be zero.
    return struct.pack("=QQQ", (1 << rights) - 1, network, scopes)


def _call(number: int, *arguments: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    result: int = libc.syscall(
        ctypes.c_long(number),
        *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments),
    )
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return result
