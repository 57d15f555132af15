# SPDX-License-Identifier: Apache-2.0
"""The machine on which the bench runs: its parts, its CPU time, memory for the disk."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench.runs import KIB, BenchError, Sample
from bench.table import heading
from tests.real.programs import PROJECT, Programs
from tests.real.programs import find as find_programs

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS = 0x20000
SYS_IO_URING_SETUP = 425
FOREIGN = 0.15
"""Cores busy with other programs below which the machine counts as quiet."""
QUIET = 0.2
"""Seconds in which it has to be so."""
HALT_POLL = Path("/sys/module/haltpoll/parameters/guest_halt_poll_ns")
"""Time that idle cores of a virtual machine poll for work before they halt."""
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


class Watched:
    """A process whose CPU time and context switches are measured."""

    def __init__(self, pid: int) -> None:
        self.clock = cpu_clock(pid)
        self._tasks = Path(f"/proc/{pid}/task")
        self._seen: dict[str, tuple[int, int]] = {}

    def cpu_ns(self) -> int:
        """Return the CPU time that it has used."""
        return time.clock_gettime_ns(self.clock)

    def switches(self) -> tuple[int, int]:
        """Return (voluntary context switches of its threads, other ones).

        Threads that have ended since the last look count as they were then.
        """
        for task in self._tasks.iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                status = (task / "status").read_text()
                self._seen[task.name] = context_switches(status)
        voluntary, forced = zip(*self._seen.values(), strict=True)
        return sum(voluntary), sum(forced)


def memory_of(pid: int) -> tuple[int, int]:
    """Return a process's (resident memory, resident memory that is in no file)."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = dict(re.findall(r"^(\w+):\s*(\d+) kB$", status, re.M))
    return int(found["VmRSS"]) * KIB, int(found["RssAnon"]) * KIB


def context_switches(status: str) -> tuple[int, int]:
    """Return a thread's voluntary and other context switches, from its status."""
    found = re.findall(r"^(?:non)?voluntary_ctxt_switches:\s*(\d+)$", status, re.M)
    voluntary, forced = found
    return int(voluntary), int(forced)


def cpu_clock(pid: int) -> int:
    """Return the clock of a process's CPU time, all its threads, in nanoseconds."""
    clock = ctypes.c_int()
    if error := LIBC.clock_getcpuclockid(pid, ctypes.byref(clock)):
        raise OSError(error, os.strerror(error))
    return clock.value


def take_sample(watched: Mapping[str, Watched]) -> Sample:
    """Look at these processes, and at how busy the machine was so far."""
    now = time.monotonic_ns()
    idle = idle_ns(Path("/proc/stat").read_text())
    cores = os.cpu_count() or 1
    cpu = {name: each.cpu_ns() for name, each in watched.items()}
    switches = {name: each.switches() for name, each in watched.items()}
    return Sample(now, cpu, now * cores - idle, switches)


def wait_for_quiet(limit: float) -> None:
    """Wait until no other program keeps the machine busy, up to a time."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        before = take_sample({})
        time.sleep(QUIET)
        after = take_sample({})
        if (after.machine - before.machine) / (after.at - before.at) < FOREIGN:
            break


def idle_ns(stat: str) -> int:
    """Return the time of all cores together that they were idle, from /proc/stat.

    All other time is busy, also with interrupts, and when a hypervisor gave the core to
    another machine. Unlike the busy times next to it, which are counted by the timer's
    tick, the idle time is measured.
    """
    idle, iowait = stat.split("\n", 1)[0].split()[4:6]
    return (int(idle) + int(iowait)) * TICK_NS


def be_prompt() -> None:
    """Run before all other programs, if allowed: seldom and shortly, but on time.

    Programs that are started from here run as usual.
    """
    with contextlib.suppress(PermissionError):
        policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
        os.sched_setscheduler(0, policy, os.sched_param(1))


@contextmanager
def placed(core: int | None) -> Iterator[None]:
    """Programs that are started meanwhile run on one core, for ever; None: on any.

    0 is the first of the cores that this program may use; with too few there is no
    place.
    """
    cores = sorted(os.sched_getaffinity(0))
    if core is None or core >= len(cores):
        yield
        return
    os.sched_setaffinity(0, {cores[core]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def idle_cores_poll(us: int | None, knob: Path = HALT_POLL) -> Iterator[None]:
    """Let idle cores poll for work for a time meanwhile. None: as they are set up."""
    if us is None:
        yield
        return
    try:
        before = knob.read_text()
        knob.write_text(f"{us * 1000}\n")
    except OSError as error:
        raise BenchError(f"cannot let idle cores poll for {us} us: {error}") from error
    try:
        yield
    finally:
        knob.write_text(before)


def idle_poll_us(knob: Path = HALT_POLL) -> int | None:
    """Return the microseconds that idle cores poll for work, if known."""
    try:
        return int(knob.read_text()) // 1000
    except OSError:
        return None


def io_uring_works() -> bool:
    """May programs use it? Containers often forbid it."""
    LIBC.syscall(SYS_IO_URING_SETUP, 0, None)
    return ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS)


@contextmanager
def tmpfs(path: Path, size: int) -> Iterator[bool]:
    """A tmpfs of huge pages for this process and its children. False: not allowed.

    It goes away with this process, however that ends.
    """
    private = ["mount", "--make-rprivate", "/"]
    options = f"huge=always,size={size}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "airlock-bench", str(path)]
    if LIBC.unshare(CLONE_NEWNS) != 0 or not runs(private) or not runs(mount):
        yield False
        return
    try:
        yield True
    finally:
        runs(["umount", "--lazy", str(path)])


def found_programs(needed: str) -> Programs | None:
    """Return the real programs, and print machine and versions; if there are none,
    print the reason. `needed` are their names.
    """
    programs = find_programs()
    if isinstance(programs, str):
        print(f"bench: needs {needed}: {programs}", file=sys.stderr)
        return None
    print(heading(describe(programs)), flush=True)
    return programs


def describe(programs: Programs) -> dict[str, object]:
    """Everything about machine and programs that figures depend on."""
    return {
        "cpu": find(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()),
        "cores": os.cpu_count(),
        "virtual": bool(
            re.search(
                r"^flags.*\bhypervisor\b", Path("/proc/cpuinfo").read_text(), re.M
            )
        ),
        "idle_poll_us": idle_poll_us(),
        "memory": find(r"MemTotal: *(.*)", Path("/proc/meminfo").read_text()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "vhost-airlock": airlock_version(),
        "commit": said(["git", "-C", str(PROJECT), "describe", "--always", "--dirty"]),
        "qemu-storage-daemon": find(
            r"version (\S+)", said(programs("qemu-storage-daemon", "--version"))
        ),
        "libblkio": said(programs("pkg-config", "--modversion", "blkio")),
    }


def airlock_version() -> str:
    try:
        return version("vhost-airlock")
    except PackageNotFoundError:
        return ""


def said(argv: list[str]) -> str:
    """Return the output of a program; "" when there is no such program."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def runs(argv: list[str]) -> bool:
    """Run a program. False: it failed, or there is none."""
    try:
        return subprocess.run(argv, capture_output=True).returncode == 0
    except OSError:
        return False


def find(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""
