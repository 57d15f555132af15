# SPDX-License-Identifier: Apache-2.0
"""Landlock: the process may do nothing with files any more (landlock(7)).

A right that a ruleset handles is denied wherever no rule grants it, and here are no
rules. The kernel is asked for each possible right if it knows it: so all rights that
the kernel can deny are denied, also those that are newer than this code. (Version 9
has connecting to a socket by its path, version 6 signals and abstract sockets.)

The C library has no functions for Landlock, so these are bare system calls.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from ..vhost.fds import Fd

CREATE_RULESET, RESTRICT_SELF = 444, 446
"""Numbers of system calls, the same on every architecture."""
CREATE_RULESET_VERSION = 1
"""A flag: return the version, and make no ruleset."""

KINDS = 3
"""Kinds of rights in a ruleset's attributes: for files, for the network, and scopes."""
BITS = 64

_UNKNOWN = (errno.EINVAL, errno.E2BIG)
"""Errors of a kernel that does not know a right, or no right of that kind."""

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long


def version() -> int:
    """Return the version of Landlock; 0: the kernel has none, or it is disabled."""
    try:
        return _call(CREATE_RULESET, None, 0, CREATE_RULESET_VERSION)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return 0
        raise


def restrict_files() -> bool:
    """Deny this thread all rights that can be denied. False: there is no Landlock.

    The thread must have no_new_privs.
    """
    if not version():
        return False
    with Fd(_ruleset(known_rights())) as ruleset:
        _call(RESTRICT_SELF, ruleset.fileno(), 0)
    return True


def known_rights() -> list[int]:
    """Return the rights that this kernel can deny: a mask for each of the KINDS."""
    masks = [0] * KINDS
    for kind in range(KINDS):
        for bit in range(BITS):
            if _known(kind, 1 << bit):
                masks[kind] |= 1 << bit
    return masks


def _known(kind: int, right: int) -> bool:
    """Does the kernel make a ruleset for this right?"""
    masks = [0] * KINDS
    masks[kind] = right
    try:
        os.close(_ruleset(masks))
    except OSError as error:
        if error.errno in _UNKNOWN:
            return False
        raise
    return True


def _ruleset(masks: list[int]) -> int:
    """Return the descriptor of a ruleset that handles these rights."""
    attributes = struct.pack(f"={KINDS}Q", *masks)
    return _call(CREATE_RULESET, attributes, len(attributes), 0)


def _call(number: int, *arguments: int | bytes | None) -> int:
    result: int = LIBC.syscall(
        ctypes.c_long(number),
        *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments),
    )
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return result
