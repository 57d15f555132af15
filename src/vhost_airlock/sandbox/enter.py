# SPDX-License-Identifier: Apache-2.0
"""The process drops its rights, once each socket and file that needs them is open.

From then on it has its sockets and descriptors, and descriptors that peers send, and
can't start programs, open files, or get more rights, even if an attacker has taken it
over:

- no_new_privs, so that no program gives it rights;
- bounds for descriptors, and no core dumps, which would have the guest's memory;
- other processes of the same user can't look into its memory;
- Landlock: it can do nothing with files, as far as the kernel can deny that;
- seccomp: the system calls of syscalls.py, and no others.

All of this binds this process and its threads. Another process, the broker
(process/broker.py), connects, starts back-ends and removes sockets; it was forked
before.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import traceback

from ..errors import StartError
from .files import restrict_files
from .syscalls import load, restrict_calls

log = logging.getLogger(__name__)

MAX_FDS = 2048
"""The most descriptors: 256 rings have six each, and the pool, the workers and the
sockets have a few hundred more."""

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38


def enter() -> None:
    """Lock this process in, while it has one thread. StartError if that fails."""
    try:
        library = load()
        _load_what_is_loaded_late()
        _limit()
        _prctl("PR_SET_DUMPABLE", _PR_SET_DUMPABLE, 0)
        _prctl("PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)
        if not restrict_files():
            log.info("sandbox: this kernel has no Landlock; seccomp has to do")
        restrict_calls(library)
    except OSError as error:
        raise StartError(
            f"can't enter the sandbox: {error.strerror or error}"
            " (--sandbox=off does without)"
        ) from None


def _load_what_is_loaded_late() -> None:
    """Load modules and libraries that would be opened later, when no file can be."""
    try:
        raise StartError("")
    except StartError:
        traceback.format_exc()
    with contextlib.suppress(OSError):
        ctypes.CDLL("libgcc_s.so.1")  # glibc's pthread_exit() does


def _limit() -> None:
    """Set limits for core dumps and descriptors, never above those in force."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FDS if hard == resource.RLIM_INFINITY else min(hard, MAX_FDS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _prctl(name: str, option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
