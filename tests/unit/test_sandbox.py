# SPDX-License-Identifier: Apache-2.0
"""What a process that has locked itself in can do still, each in one of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vhost_airlock.sandbox import files

BEFORE = """
import ctypes, errno, fcntl, logging, mmap, os, resource, select, signal, socket, sys
import threading
from vhost_airlock.sandbox import enter, files, syscalls
from vhost_airlock.process.sockets import Listener
libc = ctypes.CDLL(None, use_errno=True)
seccomp = ctypes.CDLL(syscalls.LIBRARY)

def call(name, *arguments):
    number = seccomp.seccomp_syscall_resolve_name(name.encode())
    assert number > 0, name
    result = libc.syscall(number, *map(ctypes.c_long, arguments))
    return result if result >= 0 else -ctypes.get_errno()

one = socket.socket(socket.AF_UNIX)
two, three = socket.socketpair()
own = os.open("/", os.O_RDONLY)
"""
ENTER = "enter.enter([])\n"
OVER = "print('over', flush=True)\n"


def python(code: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
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
    assert list(tmp_path.iterdir()) == []


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
    assert list(tmp_path.iterdir()) == []


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
    "tracebacks": """
try:
    Listener("")
except Exception:
    logging.exception("trouble")
""",
}


@pytest.mark.parametrize("code", ALLOWED.values(), ids=ALLOWED.keys())
def test_what_it_takes_to_serve_goes_on(code: str) -> None:
    done = python(BEFORE + ENTER + code)
    assert done.returncode == 0, done.stderr


def test_sockets_that_listen_are_served_and_removed(tmp_path: Path) -> None:
    """So can one be that something else made before: it need not be for vhost-user."""
    done = python(
        BEFORE
        + """
listener = Listener("folder/sock")
enter.enter([listener.path])
one.connect("folder/sock")
listener.accept().send(b"hello")
assert one.recv(5) == b"hello"
listener.close()
""",
        folder(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.skipif(not files.version(), reason="this kernel has no Landlock")
def test_nothing_else_can_be_removed(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    done = python(
        BEFORE
        + """
enter.enter(["folder/sock"])
try:
    os.unlink("precious")
except PermissionError:
    print("denied")
""",
        folder(tmp_path),
    )
    assert done.stdout == "denied\n", done.stderr
    assert (tmp_path / "precious").exists()


def folder(path: Path) -> Path:
    (path / "folder").mkdir()
    return path


def test_kernel_without_landlock_is_told_of_and_will_do() -> None:
    done = python(
        BEFORE
        + "logging.basicConfig(level='INFO')\n"
        + "files.version = lambda: 0\n"
        + ENTER
        + OVER
        + "os.fork()"
    )
    assert "no Landlock" in done.stderr
    assert (done.stdout, done.returncode) == ("over\n", -signal.SIGSYS)


REFUSES = """
# An outer sandbox that knows neither Landlock nor clone3, as that of a container.
seccomp.seccomp_init.restype = ctypes.c_void_p
context = ctypes.c_void_p(seccomp.seccomp_init(0x7fff0000))
for name in (b"landlock_create_ruleset", b"clone3"):
    number = seccomp.seccomp_syscall_resolve_name(name)
    fail = ctypes.c_uint32(0x00050000 | {error})
    assert seccomp.seccomp_rule_add_array(context, fail, number, 0, None) == 0
assert seccomp.seccomp_load(context) == 0
"""


@pytest.mark.parametrize("error", ["errno.EPERM", "errno.ENOSYS"])
def test_it_may_be_in_a_sandbox_already(error: str) -> None:
    done = python(
        BEFORE
        + REFUSES.format(error=error)
        + "enter.log.info = print\n"
        + "assert not files.version()\n"
        + ENTER
        + "thread = threading.Thread(target=print, args=['served'])\n"
        + "thread.start(); thread.join()\n"
        + OVER
        + "os.fork()"
    )
    assert done.returncode == -signal.SIGSYS, done.stderr
    assert "no Landlock" in done.stdout
    assert done.stdout.endswith("\nserved\nover\n")


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
        "vhost-airlock: can't enter the sandbox: there is no libno.so.1"
        " (--sandbox=off does without)\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("abi", range(1, 12))
def test_only_what_a_version_of_landlock_knows_is_handled(abi: int) -> None:
    rights = {1: 1 << 13, 2: 1 << 14, 3: 1 << 15, 4: 1 << 15}.get(abi, 1 << 16)
    of_files, network, scopes = (
        int.from_bytes(files.handled(abi)[at : at + 8], sys.byteorder)
        for at in (0, 8, 16)
    )
    assert of_files == rights - 1
    assert network == (3 if abi >= 4 else 0)
    assert scopes == (3 if abi >= 6 else 0)
