# SPDX-License-Identifier: Apache-2.0
"""The targets of the loads: one back-end, reached directly and in other ways."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.fronts import Fronts
from bench.machine import Watched, io_uring_works, placed, tmpfs
from bench.runs import MIB, BenchError, Case
from tests.real.airlock import airlock
from tests.real.processes import Process
from tests.real.programs import Programs
from tests.real.qmp import QmpError
from tests.real.storage import Disk, StorageDaemon, storage_daemon

DIRECT, TUNED, NBD = "direct", "tuned", "nbd"
AIRLOCKS = {
    "airlock": (),
    "blocking": ("--poll-us=0",),
    "busy": ("--poll-us=1000000",),
}
"""Options of the airlocks that are measured, by the name that tables give them."""

NAMES = (DIRECT, TUNED, *AIRLOCKS, NBD)
QUICK = (DIRECT, "airlock", "blocking")
"""Targets of the short form."""

DISK_SIZE = 1 << 30
QUEUES = 2
DEFAULT_POLL = 32_768
"""Nanoseconds that an iothread of QEMU polls at most, unless it's told otherwise."""
LONG_POLL = 1_000_000
COUNTERS = "counters: "
"""The text before the counters in the airlock's log, when a session ends."""


@dataclass(frozen=True)
class FileInMemory(Disk):
    """The file, with the fastest way to it that the daemon has."""

    def blockdev(self) -> str:
        aio = "io_uring" if io_uring_works() else "threads"
        return f"{super().blockdev()},aio={aio}"


@dataclass(frozen=True)
class Target:
    """The socket for a load program, and the processes whose CPU time is measured."""

    name: str
    start: Callable[[Fronts, Case], Process]
    """Start the load."""
    watched: Mapping[str, Watched]
    prepare: Callable[[], object] = lambda: None
    counted: Callable[[], Mapping[str, float]] = dict
    """Notifications for each request of the last run, as far as the target knows."""


@contextmanager
def back_end(
    programs: Programs, folder: Path, core: int | None = None
) -> Iterator[tuple[StorageDaemon, Path]]:
    """Start the daemon with the disk, and return it and its socket.

    `core`: where it runs, see placed().
    """
    with ExitStack() as stack:
        disk = FileInMemory(stack.enter_context(image(folder)), queues=QUEUES)
        with placed(core):
            started = storage_daemon(programs, disk, folder / "back.sock")
            found = stack.enter_context(started)
        yield found


@contextmanager
def targets(
    programs: Programs,
    folder: Path,
    names: Collection[str] = QUICK,
    core: int | None = None,
) -> Iterator[list[Target]]:
    """Start the back-end and the airlocks, and return these targets in order.

    All connect to the same daemon: an airlock does so when a front-end comes.
    """
    with ExitStack() as stack:
        daemon, back = stack.enter_context(back_end(programs, folder, core))
        watched = {"back": Watched(daemon.pid)}
        found = {
            DIRECT: Target(DIRECT, vhost(back), watched, polling(daemon, False)),
            TUNED: Target(TUNED, vhost(back, True), watched, polling(daemon, True)),
        }
        for name in AIRLOCKS.keys() & names:
            found[name] = stack.enter_context(
                through_airlock(name, daemon, back, folder, *AIRLOCKS[name])
            )
        if NBD in names:
            path = stack.enter_context(nbd_export(daemon, folder / "nbd.sock"))
            found[NBD] = Target(NBD, nbd(path), watched, polling(daemon, False))
        yield [found[name] for name in NAMES if name in names]


@contextmanager
def through_airlock(
    name: str,
    daemon: StorageDaemon,
    back: Path,
    folder: Path,
    *options: str,
    source: Path | None = None,
) -> Iterator[Target]:
    """Start an airlock, of the build whose modules are in `source` if that is given."""
    front = folder / f"{name}.sock"
    env = {"PYTHONPATH": str(source)} if source else None
    with airlock(back, front, *options, "--log-level=debug", env=env) as proxy:
        if source and f"{source}/" not in Path(f"/proc/{proxy.pid}/maps").read_text():
            raise BenchError(f"{name}: an airlock of another build than {source} runs")
        yield Target(
            name,
            vhost(front),
            {"airlock": Watched(proxy.pid), "back": Watched(daemon.pid)},
            polling(daemon, False),
            Counters(proxy),
        )


def vhost(front: Path, busy: bool = False) -> Callable[[Fronts, Case], Process]:
    return lambda fronts, case: fronts.vhost(front, case, busy=busy)


def nbd(front: Path) -> Callable[[Fronts, Case], Process]:
    return lambda fronts, case: fronts.nbd(front, case, busy=False)


def polling(daemon: StorageDaemon, long: bool) -> Callable[[], object]:
    """Return the options that let the daemon's iothread poll as usual, or long."""
    value = LONG_POLL if long else DEFAULT_POLL
    place = {"path": "/objects/io", "property": "poll-max-ns"}
    return lambda: daemon.qmp("qom-set", **place, value=value)


@contextmanager
def nbd_export(daemon: StorageDaemon, path: Path) -> Iterator[Path]:
    """Let the daemon serve the same disk by NBD, from the same iothread.

    The export goes before the daemon ends, and once no client is left: QEMU 11.1 aborts
    when it ends while one is just leaving.
    """
    address = {"type": "unix", "data": {"path": str(path)}}
    daemon.qmp("nbd-server-start", addr=address, max_connections=QUEUES)
    daemon.qmp(
        "block-export-add",
        type="nbd",
        id="nbd",
        node_name="disk",
        name="disk",
        writable=True,
        iothread="io",
    )
    yield path

    def unused() -> bool:
        try:
            daemon.qmp("block-export-del", id="nbd", mode="safe")
        except QmpError:
            return False
        return True

    daemon.wait_until(unused)
    daemon.qmp.wait_for("BLOCK_EXPORT_DELETED", id="nbd")


class Counters:
    """The counters of an airlock's last session, read from its log."""

    def __init__(self, proxy: Process) -> None:
        self._proxy = proxy
        self._sessions = 0

    def __call__(self) -> dict[str, float]:
        self._proxy.wait_until(lambda: len(self._lines()) > self._sessions)
        lines = self._lines()
        self._sessions = len(lines)
        return per_request(json.loads(lines[-1].partition(COUNTERS)[2]))

    def _lines(self) -> list[str]:
        # The last line may not be complete yet.
        lines = self._proxy.output().split("\n")[:-1]
        return [line for line in lines if COUNTERS in line]


def per_request(counters: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """Return an airlock's notifications and sleeps, for each request."""
    rings = [each for name, each in counters.items() if name.startswith("ring")]
    workers = [each for name, each in counters.items() if name.startswith("worker")]
    done = sum(ring["completions"] for ring in rings) or 1
    return {
        "airlock kicks": sum(ring["kicks"] for ring in rings) / done,
        "airlock calls": sum(ring["calls"] for ring in rings) / done,
        "airlock sleeps": sum(worker["sleeps"] for worker in workers) / done,
    }


@contextmanager
def image(folder: Path) -> Iterator[Path]:
    """A file in memory, in huge pages where they are allowed."""
    where = folder / "memory"
    where.mkdir()
    with ExitStack() as stack:
        if not stack.enter_context(tmpfs(where, DISK_SIZE + 16 * MIB)):
            in_shm = tempfile.TemporaryDirectory(prefix="airlock-", dir="/dev/shm")
            where = Path(stack.enter_context(in_shm))
        path = where / "disk.img"
        with path.open("wb") as file:
            block = bytes(range(256)) * (MIB // 256)
            for _ in range(DISK_SIZE // MIB):
                file.write(block)
        yield path
