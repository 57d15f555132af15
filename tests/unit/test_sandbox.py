# SPDX-License-Identifier: Apache-2.0
"""The rights that a process keeps in the sandbox, each tried in one of its own."""

from __future__ import annotations

import errno
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from vhost_airlock.sandbox import enter, files, syscalls

BEFORE = """
import ctypes, errno, fcntl, mmap, os, resource, select, signal, socket, sys
import threading
from vhost_airlock.sandbox import enter, files, syscalls
from vhost_airlock.process.log import log_to_stderr
from vhost_airlock.process.sockets import Listener
log_to_stderr("info", "test")
libc = ctypes.CDLL(None, use_errno=True)
seccomp = ctypes.CDLL(syscalls.LIBRARY)

def call(name, *arguments):
    number = seccomp.seccomp_syscall_resolve_name(name.encode())
    assert number > 0, name
    result = libc.syscall(number, *map(ctypes.c_long, arguments))
    return result if result >= 0 else -ctypes.get_errno()

one = socket.socket(socket.AF_UNIX)
foreign = socket.socket(socket.AF_UNIX)
foreign.bind("foreign")
foreign.listen()
datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
datagrams.bind("datagrams")
open("precious", "w").close()
two, three = socket.socketpair()
own = os.open("/", os.O_RDONLY)
here = os.open(".", os.O_RDONLY)
"""
ENTER = "enter.enter()\n"
THERE = ("foreign", "datagrams", "precious")
"""The files in the folder before."""
OVER = "print('over', flush=True)\n"


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run this in a folder of its own."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        text=True,
    )


DEADLY = {
    "start a program": "os.execv('/bin/true', ['true'])",
    "fork": "os.fork()",
    "clone a process": "call('clone', signal.SIGCHLD, 0, 0, 0, 0)",
    "thread in a new namespace": "call('clone', 0x00010100 | 0x10000000, 0, 0, 0, 0)",
    "trace": "call('ptrace', 0, 0, 0, 0)",
    "read another's memory": "call('process_vm_readv', os.getppid(), 0, 0, 0, 0, 0)",
    "write another's memory": "call('process_vm_writev', os.getppid(), 0, 0, 0, 0, 0)",
    "signal another": "os.kill(os.getppid(), 0)",
    "signal another's thread": "call('tgkill', os.getppid(), os.getppid(), 0)",
    "bind another to a processor": "call('sched_setaffinity', os.getppid(), 0, 0)",
    "take another's descriptor": "call('pidfd_open', os.getppid(), 0)",
    "connect to a socket of another": "one.connect('foreign')",
    "connect to an abstract socket": "one.connect('\\0foreign')",
    "make a socket": "socket.socket(socket.AF_UNIX)",
    "make sockets for datagrams": "socket.socketpair(type=socket.SOCK_DGRAM)",
    "send to a socket with a path": "two.sendto(b'x', 'datagrams')",
    "remove a file": "os.unlink('precious')",
    "remove a file by a descriptor": "os.unlink('precious', dir_fd=here)",
    "remove a folder": "os.rmdir('folder')",
    "cut a file short": "os.truncate('precious', 0)",
    "TCP": "socket.socket(socket.AF_INET)",
    "netlink": "socket.socket(socket.AF_NETLINK)",
    "vsock": "socket.socket(40)",
    "bind": "one.bind('here')",
    "listen": "one.listen()",
    "map code": "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
    "make data code": "call('mprotect', 0, 4096, 5)",
    "make data code by a key": "call('pkey_mprotect', 0, 4096, 5, -1)",
    "make all that can be read code": "call('personality', 0x0400000)",
    "bpf": "call('bpf', 0, 0, 0)",
    "perf": "call('perf_event_open', 0, 0, -1, -1, 0)",
    "io_uring": "call('io_uring_setup', 1, 0)",
    "userfaultfd": "call('userfaultfd', 0)",
    "keys": "call('keyctl', 0, 0)",
    "new namespaces": "call('unshare', 0x10000000)",
    "mount": "call('mount', 0, 0, 0, 0, 0)",
    "become another user": "os.setuid(os.getuid())",
    "be seen again": "call('prctl', 4, 1, 0, 0, 0)",
    "raise limits": "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
    "terminal input": "call('ioctl', 0, 0x5412, 0)",
    "signals from a descriptor": "fcntl.fcntl(two, fcntl.F_SETOWN, os.getpid())",
    "change rights": "os.chmod('here', 0o777)",
    "make a folder": "os.mkdir('here')",
    "make a link": "os.symlink('/', 'here')",
    "rename": "os.rename('here', 'there')",
    "change folder": "os.chdir('/')",
}


EACH = """
for name, code in {cases!r}.items():
    begun = os.eventfd(0)
    pid = os.fork()
    if pid == 0:
        try:
            {enter}
            os.eventfd_write(begun, 1)
            exec(code)
        finally:
            os._exit(0)
    os.eventfd_read(begun)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), name)
"""


def outcomes(enter: str, cwd: Path) -> dict[str, int]:
    """How the processes end of which each does one deadly thing."""
    done = python(BEFORE + EACH.format(cases=DEADLY, enter=enter), cwd)
    found = [line.split(" ", 1) for line in done.stdout.splitlines()]
    return {name: int(status) for status, name in found}


def test_what_is_never_needed_ends_the_process(tmp_path: Path) -> None:
    found = outcomes(ENTER, tmp_path)
    assert found == dict.fromkeys(DEADLY, -signal.SIGSYS)
    assert {path.name for path in tmp_path.iterdir()} == {*THERE}


def test_it_would_not_end_it_without(tmp_path: Path) -> None:
    """The test of the test: it is the sandbox that does."""
    found = outcomes("pass", tmp_path)
    assert found == dict.fromkeys(DEADLY, 0)


FAILING = {
    "open a file": "open('/etc/passwd')",
    "make a file": "open('here', 'w')",
    "open by a descriptor": "os.open('etc/passwd', os.O_RDONLY, dir_fd=own)",
    "look into a folder": "os.listdir('/')",
    "read a link": "os.readlink('/proc/self/exe')",
}


@pytest.mark.parametrize("code", FAILING.values(), ids=FAILING.keys())
def test_files_can_not_be_opened(code: str, tmp_path: Path) -> None:
    done = python(
        BEFORE
        + ENTER
        + f"try:\n    {code}\nexcept PermissionError:\n    print('denied')\n",
        tmp_path,
    )
    assert (done.stdout, done.returncode) == ("denied\n", 0), done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {*THERE}


ALLOWED = {
    "threads": "t = threading.Thread(target=os.getpid); t.start(); t.join()",
    "memory": "mmap.mmap(-1, 1 << 20).close()",
    "sealed memory": """
fd = os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
os.ftruncate(fd, 4096)
fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
mmap.mmap(fd, 4096)[:1] = b"x"
""",
    "eventfds": """
fd = os.eventfd(0, os.EFD_CLOEXEC)
os.eventfd_write(fd, 1)
poll = select.epoll()
poll.register(fd)
assert poll.poll()
assert os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT) == 8
""",
    "sockets with descriptors": """
socket.send_fds(two, [b"x"], [three.fileno()])
(fd,) = socket.recv_fds(three, 1, 1)[1]
os.set_inheritable(os.dup(fd), False)
two.setblocking(False)
""",
    "a device's state": "os.write(os.pipe2(os.O_CLOEXEC)[1], b'x')",
    "signals of its own": "signal.raise_signal(signal.SIGURG)",
}


@pytest.mark.parametrize("code", ALLOWED.values(), ids=ALLOWED.keys())
def test_what_it_takes_to_serve_goes_on(code: str, tmp_path: Path) -> None:
    done = python(BEFORE + ENTER + code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_sockets_that_listen_are_served(tmp_path: Path) -> None:
    """So can one be that something else made before: it need not be for vhost-user."""
    done = python(
        BEFORE
        + """
listener = Listener("sock")
one.connect("sock")
listener.disown()
enter.enter()
listener.accept().send(b"hello")
assert one.recv(5) == b"hello"
listener.close()
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sock").is_socket()


LANDLOCKED = """
os.mkdir("folder")
address = f"\\0airlock-test-{{os.getpid()}}"
abstract = socket.socket(socket.AF_UNIX)
abstract.bind(address)
abstract.listen()
assert files.version()
libc.prctl(38, 1, 0, 0, 0)
assert files.restrict_files()
for name, code in {cases!r}.items():
    try:
        exec(code)
        print("done", name)
    except PermissionError:
        print("denied", name)
"""

FILES = {
    "remove": "os.unlink('precious')",
    "remove by a descriptor": "os.unlink('precious', dir_fd=here)",
    "remove a folder": "os.rmdir('folder')",
    "rename": "os.rename('precious', 'there')",
    "open": "open('precious')",
    "write": "open('precious', 'a')",
    "make": "open('new', 'w')",
    "make a folder": "os.mkdir('new')",
    "make a socket": "one.bind('new')",
    "run": "os.execv('/bin/true', ['true'])",
}


@pytest.mark.skipif(not files.version(), reason="this kernel has no Landlock")
def test_landlock_alone_denies_all_of_files(tmp_path: Path) -> None:
    """Deeds that seccomp prevents before Landlock."""
    cases = dict(FILES)
    if files.version() >= 3:
        cases["cut short"] = "os.truncate('precious', 0)"
    if files.version() >= 6:
        cases["connect to an abstract socket"] = "one.connect(address)"
    if files.version() >= 9:
        cases["connect"] = "one.connect('foreign')"
        cases["send"] = (
            "socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', 'datagrams')"
        )
    code = BEFORE + LANDLOCKED.format(cases=cases)
    done = python(code, tmp_path)
    assert done.stdout.splitlines() == [f"denied {name}" for name in cases], done.stderr


def test_failures_are_told_with_tracebacks(tmp_path: Path) -> None:
    """Those that nothing catches in threads, and those that are logged at debug."""
    done = python(
        BEFORE
        + "log_to_stderr('debug', 'test')\n"
        + ENTER
        + """
def fail():
    raise ValueError("not caught")

thread = threading.Thread(target=fail)
thread.start()
thread.join()
try:
    raise ValueError("caught")
except ValueError:
    enter.log.debug("trouble", exc_info=True)
"""
        + OVER,
        tmp_path,
    )
    assert (done.stdout, done.returncode) == ("over\n", 0), done.stderr
    assert "in fail\nValueError: not caught\n" in done.stderr
    assert "debug: trouble\n" in done.stderr
    assert "debug: ValueError: caught\n" in done.stderr


def test_kernel_without_landlock_is_told_of_and_will_do(tmp_path: Path) -> None:
    done = python(
        BEFORE + "files.version = lambda: 0\n" + ENTER + OVER + "os.fork()",
        tmp_path,
    )
    assert "no Landlock" in done.stderr
    assert (done.stdout, done.returncode) == ("over\n", -signal.SIGSYS)


REFUSES = """
# An outer sandbox that knows neither Landlock nor clone3, as that of a container.
seccomp.seccomp_init.restype = ctypes.c_void_p
context = ctypes.c_void_p(seccomp.seccomp_init(0x7fff0000))
for name in (b"landlock_create_ruleset", b"clone3"):
    number = seccomp.seccomp_syscall_resolve_name(name)
    fail = ctypes.c_uint32({error})
    assert seccomp.seccomp_rule_add_array(context, fail, number, 0, None) == 0
assert seccomp.seccomp_load(context) == 0
"""


@pytest.mark.parametrize("error", ["errno.EPERM", "errno.ENOSYS"])
def test_it_may_be_in_a_sandbox_already(error: str, tmp_path: Path) -> None:
    done = python(
        BEFORE
        + REFUSES.format(error=f"0x50000 | {error}")
        + "enter.log.info = print\n"
        + "assert not files.version()\n"
        + ENTER
        + "thread = threading.Thread(target=print, args=['served'])\n"
        + "thread.start(); thread.join()\n"
        + OVER
        + "os.fork()",
        tmp_path,
    )
    assert done.returncode == -signal.SIGSYS, done.stderr
    assert "no Landlock" in done.stdout
    assert done.stdout.endswith("\nserved\nover\n")


TROUBLE = {
    "PR_GET_SECCOMP": "prctl",
    "Landlock": "landlock_restrict_self",
    "libseccomp: the kernel takes no filter": "seccomp",
}
"""The text of the error, and the system call that an outer sandbox refuses."""


def refused(call: str, action: str, cwd: Path) -> str:
    """Enter a sandbox within one that does this to a call: the error."""
    if call.startswith("landlock") and not files.version():
        pytest.skip("this kernel has no Landlock")
    refuses = REFUSES.replace('(b"landlock_create_ruleset", b"clone3")', f'[b"{call}"]')
    done = python(
        BEFORE
        + refuses.format(error=action)
        + f"try:\n    {ENTER}\nexcept Exception as error:\n    print(error)\n",
        cwd,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return line


@pytest.mark.parametrize(("said", "call"), TROUBLE.items())
def test_trouble_names_its_cause(said: str, call: str, tmp_path: Path) -> None:
    """To do without the sandbox is no advice where another one is in its way."""
    line = refused(call, "0x50000 | errno.ENOMEM", tmp_path)
    assert line.startswith(f"can't enter the sandbox: {said}")
    assert "Cannot allocate memory" in line
    assert "SystemCallFilter= of systemd" in line
    assert "--sandbox=off" not in line


KILL = {"the process": "0x80000000", "the thread": "0"}
"""Of a filter that knows no better, as systemd's unless it is told an error number."""


@pytest.mark.parametrize("action", KILL.values(), ids=KILL.keys())
@pytest.mark.parametrize(
    ("call", "named"),
    [
        (
            "landlock_create_ruleset",
            "landlock_create_ruleset or landlock_restrict_self",
        ),
        ("landlock_restrict_self", "landlock_create_ruleset or landlock_restrict_self"),
        ("seccomp", "seccomp"),
    ],
)
def test_filter_that_would_end_the_process_is_named(
    call: str, named: str, action: str, tmp_path: Path
) -> None:
    line = refused(call, action, tmp_path)
    assert line.startswith(f"can't enter the sandbox: {named} ends the process by SIGS")
    assert "SystemCallFilter= of systemd" in line
    assert "--sandbox=off" not in line


def test_trouble_names_the_way_without(tmp_path: Path) -> None:
    done = python(
        BEFORE
        + "syscalls.LIBRARY = 'libno.so.1'\n"
        + "from vhost_airlock.cli import main as cli\n"
        + "sys.exit(cli.main(['run', '--front-connect=F', '--backend-listen=B']))",
        tmp_path,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "vhost-airlock F: error: can't enter the sandbox: there is no libno.so.1"
        " (--sandbox=off does without)\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == {*THERE}


@pytest.mark.skipif(not files.version(), reason="this kernel has no Landlock")
def test_all_that_the_kernel_can_deny_is_denied() -> None:
    """By landlock(7), for the versions that it has; a newer one denies no less."""
    abi = files.version()
    least = {
        1: (0x1FFF, 0, 0),
        2: (0x3FFF, 0, 0),
        3: (0x7FFF, 0, 0),
        4: (0x7FFF, 0x3, 0),
        5: (0xFFFF, 0x3, 0),
        6: (0xFFFF, 0x3, 0x3),
        9: (0x1FFFF, 0x3, 0x3),
    }
    known = files.known_rights()
    expected = least[max(since for since in least if since <= abi)]
    if abi <= max(least):
        assert tuple(known) == expected
    for mask, part in zip(known, expected, strict=True):
        assert mask & part == part


@pytest.mark.parametrize(
    "masks", [(1, 0, 0), (0x1FFFF, 3, 3), (0xFFFFF, 0xFF, 7 << 60)]
)
def test_whatever_a_kernel_can_deny_is_found(
    monkeypatch: pytest.MonkeyPatch, masks: tuple[int, int, int]
) -> None:
    """Kernels older and newer than this one: E2BIG is for a kind that they lack."""

    def call(number: int, attributes: bytes, size: int, flags: int) -> int:
        assert (number, size, flags) == (files.CREATE_RULESET, 24, 0)
        wanted = struct.unpack("=QQQ", attributes)
        for right, mask in zip(wanted, masks, strict=True):
            if right & ~mask:
                raise OSError(errno.EINVAL if mask else errno.E2BIG, "unknown")
        return os.open("/dev/null", os.O_RDONLY)

    monkeypatch.setattr(files, "_call", call)
    assert tuple(files.known_rights()) == masks


# Numbers of other people's, against their headers.


def defined(header: str, name: str) -> int:
    """The value of a macro or enumerator, as the C compiler has it."""
    source = f"#include <{header}>\n#include <sys/syscall.h>\n"
    source += f"unsigned long long value = {name};\n"
    done = subprocess.run(
        ["gcc", "-x", "c", "-S", "-O1", "-o", "-", "-"],
        input=source,
        capture_output=True,
        check=False,
        text=True,
    )
    if "No such file" in done.stderr:
        pytest.skip(f"there is no {header} here")
    if found := re.search(
        r"^value:\s+\.(?:quad|xword|dword)\s+(-?\d+)", done.stdout, re.M
    ):
        return int(found[1])
    assert re.search(r"^value:\s+\.zero", done.stdout, re.M), done.stderr
    return 0


@pytest.mark.parametrize(
    ("header", "name", "value"),
    [
        ("linux/landlock.h", "SYS_landlock_create_ruleset", files.CREATE_RULESET),
        ("linux/landlock.h", "SYS_landlock_restrict_self", files.RESTRICT_SELF),
        (
            "linux/landlock.h",
            "LANDLOCK_CREATE_RULESET_VERSION",
            files.CREATE_RULESET_VERSION,
        ),
        ("linux/seccomp.h", "SECCOMP_RET_KILL_PROCESS", syscalls._KILL_PROCESS),
        ("linux/seccomp.h", "SECCOMP_RET_ERRNO", syscalls._FAIL),
        ("linux/seccomp.h", "SECCOMP_RET_ALLOW", syscalls._ALLOW),
        ("linux/sched.h", "CLONE_THREAD | CLONE_VM", syscalls._NEW_THREAD),
        (
            "linux/sched.h",
            "CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC"
            " | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWTIME",
            syscalls._NEW_NAMESPACE,
        ),
        ("linux/prctl.h", "PR_SET_NAME", syscalls._SET_NAME),
        ("linux/prctl.h", "PR_SET_VMA", syscalls._SET_VMA),
        ("linux/prctl.h", "PR_SET_DUMPABLE", enter._PR_SET_DUMPABLE),
        ("linux/prctl.h", "PR_SET_NO_NEW_PRIVS", enter._PR_SET_NO_NEW_PRIVS),
        ("sys/mman.h", "PROT_EXEC", syscalls._PROT_EXEC),
        ("asm/ioctls.h", "FIONBIO", syscalls._FIONBIO),
        ("asm/ioctls.h", "FIOCLEX", syscalls._FIOCLEX),
        ("asm/ioctls.h", "FIONCLEX", syscalls._FIONCLEX),
        ("asm/ioctls.h", "TCGETS", syscalls._TERMINAL[0]),
        ("asm/ioctls.h", "TIOCGWINSZ", syscalls._TERMINAL[2]),
        ("seccomp.h", "SCMP_FLTATR_ACT_BADARCH", syscalls._BAD_ARCH),
        ("seccomp.h", "SCMP_FLTATR_CTL_TSYNC", syscalls._ALL_THREADS),
        ("seccomp.h", "SCMP_FLTATR_API_SYSRAWRC", syscalls._RAW_ERRORS),
        ("seccomp.h", "SCMP_CMP_EQ", syscalls._EQUAL),
        ("seccomp.h", "SCMP_CMP_MASKED_EQ", syscalls._MASKED_EQUAL),
    ],
)
def test_number_is_that_of_the_header(header: str, name: str, value: int) -> None:
    assert defined(header, name) == value
