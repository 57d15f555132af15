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
import errno
import os
import resource
import signal
from collections.abc import Callable, Sequence
from functools import partial

from ..errors import StartError
from ..log import ERROR, Logger, write_by
from .files import LIBC, restrict_files
from .syscalls import load, restrict_calls

log = Logger(__name__)

MAX_FDS = 2048
"""The most descriptors: 256 rings have six each, and the pool, the workers and the
sockets have a few hundred more."""

_PR_SET_DUMPABLE = 4
_PR_GET_SECCOMP = 21
_PR_SET_NO_NEW_PRIVS = 38

Step = tuple[str, Callable[[], object]]
"""Something to do, with the system calls that it makes."""

OUTER = (
    "this process is in a filter of system calls already, SystemCallFilter= of systemd"
    " for example, which has to allow prlimit64, prctl, landlock_create_ruleset,"
    " landlock_restrict_self and seccomp"
)
"""The likely cause of an error where there is such a filter."""


def enter() -> None:
    """Lock this process in, while it has one thread. StartError if that fails."""
    filtered = False
    try:
        library = load()
        _load_what_is_loaded_late()
        filtered = True  # or prctl() would not fail
        filtered = _prctl("PR_GET_SECCOMP", _PR_GET_SECCOMP) != 0
        steps: list[Step] = [
            ("prlimit64", _limit),
            ("prctl", _renounce),
            ("landlock_create_ruleset or landlock_restrict_self", _restrict_files),
            ("seccomp", partial(restrict_calls, library)),
        ]
        if filtered:
            _rehearse(steps)
        for _, step in steps:
            step()
    except OSError as error:
        hint = OUTER if filtered else "--sandbox=off does without"
        raise StartError(
            f"can't enter the sandbox: {error.strerror or error} ({hint})"
        ) from None


def _rehearse(steps: Sequence[Step]) -> None:
    """Take these steps in another process first: a filter that we are in may end us at
    one of them, without a word. OSError names its calls then.
    """
    told, telling = os.pipe()
    process = os.fork()
    if process == 0:
        write_by(lambda *line: None, ERROR)
        try:
            for calls, step in steps:
                os.write(telling, f"{calls}\n".encode())
                step()
        finally:
            os._exit(0)
    os.close(telling)
    with open(told) as lines:
        taken = lines.read().splitlines()
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        killed = signal.Signals(os.WTERMSIG(status)).name
        raise OSError(errno.EPERM, f"{taken[-1]} ends the process by {killed}")


def _renounce() -> None:
    """Give up being looked into, and getting rights from programs."""
    _prctl("PR_SET_DUMPABLE", _PR_SET_DUMPABLE, 0)
    _prctl("PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)


def _restrict_files() -> None:
    if not restrict_files():
        log.info("this kernel has no Landlock: the sandbox is made by seccomp alone")


def _load_what_is_loaded_late() -> None:
    """Load libraries that would be opened later, when no file can be."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libgcc_s.so.1")  # glibc's pthread_exit() does


def _limit() -> None:
    """Set limits for core dumps and descriptors, never above those in force."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FDS if hard == resource.RLIM_INFINITY else min(hard, MAX_FDS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _prctl(name: str, option: int, value: int = 0) -> int:
    """Return the result of prctl(). OSError with the option's name if it fails."""
    zero = ctypes.c_ulong(0)
    result: int = LIBC.prctl(option, ctypes.c_ulong(value), zero, zero, zero)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result
