# SPDX-License-Identifier: Apache-2.0
"""seccomp: the system calls that the running process makes, and no others.

A call that is in none of these lists ends the process. Some calls just fail, as on a
kernel that lacks them: libraries try them, and do without. Where a call can do more
than the airlock needs, its arguments are checked. Arguments in memory can't be checked,
so clone3 is not allowed.

libseccomp makes the filter. It is on every Debian, and is loaded when it's needed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
from collections.abc import Iterator

from ..record import record

LIBRARY = "libseccomp.so.2"

_PLAIN = """
    read readv preadv preadv2 write writev pwritev pwritev2 close
    dup lseek ftruncate fstat fstatfs newfstatat statx
    poll ppoll epoll_create1 epoll_ctl epoll_wait epoll_pwait
    eventfd2 pipe2 memfd_create
    accept accept4 getpeername getsockname getsockopt
    recvfrom recvmsg sendmsg shutdown
    brk madvise mremap munmap
    futex set_robust_list rseq sched_yield sched_getaffinity
    rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time
    getcpu getpid gettid getuid geteuid getgid getegid getrandom
    wait4 waitid exit exit_group
"""
"""Allowed, whatever their arguments are."""

_FAILING = {
    errno.EACCES: """
        open openat stat lstat access faccessat faccessat2 readlink readlinkat getcwd
    """,
    errno.EPERM: "sysinfo uname getrlimit mlock mbind get_mempolicy",
    errno.ENOSYS: "clone3 membarrier",
}
"""Calls that libraries try. Where clone3 fails with ENOSYS, the C library makes threads
by clone."""

_PROT_EXEC = 4
_NEW_THREAD = 0x00010100
"""Flags of clone: CLONE_THREAD and CLONE_VM."""
_NEW_NAMESPACE = 0x7E020080
"""Flags of clone: all of CLONE_NEW..."""
_SET_NAME, _SET_VMA = 15, 0x53564D41
_TERMINAL = (0x5401, 0x802C542A, 0x5413)
"""TCGETS, TCGETS2 and TIOCGWINSZ: is this a terminal, and how large?"""
_SOCKET_TYPE = 0xF
"""The bits of a socket's type, without flags."""
_FIONBIO, _FIOCLEX, _FIONCLEX = 0x5421, 0x5451, 0x5450

# Numbers of libseccomp.
_KILL_PROCESS, _FAIL, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_BAD_ARCH, _ALL_THREADS, _RAW_ERRORS = 2, 4, 9
_EQUAL, _MASKED_EQUAL = 4, 7


@record
class Only:
    """A condition: an argument, masked, has this value."""

    argument: int
    value: int
    mask: int | None = None


@record
class Rule:
    """The action for a call, if all conditions hold."""

    call: str
    action: int
    conditions: tuple[Only, ...] = ()


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operation", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def rules() -> Iterator[Rule]:
    """Return a rule for each call that does not end this process."""
    for call in _PLAIN.split():
        yield _allow(call)
    for error, calls in _FAILING.items():
        for call in calls.split():
            yield Rule(call, _FAIL | error)
    for call in ("mmap", "mprotect"):
        yield _allow(call, Only(2, 0, mask=_PROT_EXEC))
    yield _allow("clone", Only(0, _NEW_THREAD, mask=_NEW_THREAD | _NEW_NAMESPACE))
    # A datagram could be sent to any socket that has a path; these have one peer.
    yield _allow(
        "socketpair",
        Only(0, socket.AF_UNIX),
        Only(1, socket.SOCK_STREAM, mask=_SOCKET_TYPE),
    )
    yield _allow("sendto", Only(4, 0))
    for request in (_FIONBIO, _FIOCLEX, _FIONCLEX):
        yield _allow("ioctl", Only(1, request))
    for request in _TERMINAL:
        yield Rule("ioctl", _FAIL | errno.ENOTTY, (Only(1, request),))
    for command in (
        fcntl.F_GETFD,
        fcntl.F_SETFD,
        fcntl.F_GETFL,
        fcntl.F_SETFL,
        fcntl.F_DUPFD_CLOEXEC,
        fcntl.F_ADD_SEALS,
        fcntl.F_GET_SEALS,
    ):
        yield _allow("fcntl", Only(1, command))
    yield _allow("prctl", Only(0, _SET_NAME))
    yield Rule("prctl", _FAIL | errno.EINVAL, (Only(0, _SET_VMA),))
    yield _allow("tgkill", Only(0, os.getpid()))
    yield _allow("prlimit64", Only(2, 0))  # to ask, not to set
    yield _allow("sched_setaffinity", Only(0, 0))  # of the thread that asks


def _allow(call: str, *conditions: Only) -> Rule:
    return Rule(call, _ALLOW, conditions)


def available() -> bool:
    """Is the library there?"""
    try:
        load()
    except OSError:
        return False
    return True


def load() -> ctypes.CDLL:
    """Return libseccomp, while files can be opened."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        raise OSError(errno.ENOENT, f"there is no {LIBRARY}") from None


def restrict_calls(library: ctypes.CDLL) -> None:
    """Admit only the calls above, for all threads. OSError if the filter can't be made
    or loaded.
    """
    library.seccomp_init.restype = ctypes.c_void_p
    found = library.seccomp_init(ctypes.c_uint32(_KILL_PROCESS))
    if not found:
        raise OSError(errno.ENOMEM, "libseccomp can't make a filter")
    context = ctypes.c_void_p(found)
    try:
        for attribute, value in ((_BAD_ARCH, _KILL_PROCESS), (_ALL_THREADS, 1)):
            code = library.seccomp_attr_set(context, attribute, ctypes.c_uint32(value))
            _check(code, "can't set up a filter")
        # Not before version 2.5; without, every error is ECANCELED.
        library.seccomp_attr_set(context, _RAW_ERRORS, ctypes.c_uint32(1))
        for rule in rules():
            _add(library, context, rule)
        _check(library.seccomp_load(context), "the kernel takes no filter")
    finally:
        library.seccomp_release(context)


def _add(library: ctypes.CDLL, context: ctypes.c_void_p, rule: Rule) -> None:
    number = library.seccomp_syscall_resolve_name(rule.call.encode())
    if number == -1:
        return  # an older libseccomp does not know it: the call ends the process
    count = len(rule.conditions)
    compared = (_Comparison * max(count, 1))()
    for i, only in enumerate(rule.conditions):
        if only.mask is None:
            compared[i] = _Comparison(only.argument, _EQUAL, only.value, 0)
        else:
            compared[i] = _Comparison(
                only.argument, _MASKED_EQUAL, only.mask, only.value
            )
    code = library.seccomp_rule_add_array(
        context, ctypes.c_uint32(rule.action), number, count, compared
    )
    _check(code, f"can't add a rule for {rule.call}")


def _check(code: int, trouble: str) -> None:
    if code != 0:
        raise OSError(-code, f"libseccomp: {trouble} ({os.strerror(-code)})")
