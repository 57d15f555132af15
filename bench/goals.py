# SPDX-License-Identifier: Apache-2.0
"""Goals that the airlock keeps under any load: the demo's time, rest, memory, scale.

Each is measured on an airlock before a back-end in a process of its own.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import mmap
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.machine import Watched, memory_of, take_sample, wait_for_quiet
from bench.runs import KIB, MIB, BenchError
from bench.start import starts
from tests.real.airlock import airlock
from tests.real.processes import Process
from tests.real.programs import Programs
from tests.real.storage import Disk, storage_daemon
from tests.support.plane import Lane, World
from vhost_airlock.dataplane.pump import Pump
from vhost_airlock.peers import Buffer
from vhost_airlock.peers.blk_load import LoadPlan, LoadResult, measure
from vhost_airlock.peers.guest import BlkGuest

DEMO_SECONDS = 20
STARTS = 10
READY_MS = 80
OWN_LIMIT = 9 * MIB
IDLE = 10.0
"""Seconds in which an idle device must do nothing at all."""
RSS_LIMIT = 40 * MIB
RINGS = (1, 4, 16, 64)
IN_FLIGHT = 128
"""Requests, over all rings."""
RAM = {"1 GiB": 1 << 30, "32 GiB": 32 << 30, "1 TiB": 1 << 40}
SECONDS = 1.0
ROUNDS = 3
TOLERANCE = 1.25
MOMENT = 2.0
"""Seconds to wait for a quiet machine, before each run."""
RING = 256
BATCHES = 500
WARM = 8
"""Buffers in use, so that they stay in caches."""
HEADER = 12
SEGMENTS = ((HEADER + 64,), (HEADER, 64))
PACKET_NS = 120
COPY = 64 * KIB
COLD = 128 * MIB


@dataclass(frozen=True)
class Goal:
    """A figure, and its goal if there is one."""

    name: str
    found: str
    wanted: str = ""
    met: bool = True


def measure_goals(programs: Programs, folder: Path) -> Iterator[Goal]:
    """Measure all goals, one after the other."""
    yield demo()
    disk = Disk(size=1 << 30, queues=max(RINGS))
    with storage_daemon(programs, disk, folder / "goals.sock") as (_, back):
        yield from start(back, folder)
        yield from idle(back, folder)
        yield from rings(back, folder)
        yield from guest_memory(back, folder)
    yield from packets()
    yield from copying()


def demo() -> Goal:
    """The demo's time, as a new user tries it."""
    command = [sys.executable, "-m", "vhost_airlock", "demo", "--json"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise BenchError(f"the demo failed: {done.stderr.decode(errors='replace')}")
    seconds = json.loads(done.stdout)["seconds"]
    return Goal(
        "the demo",
        f"{seconds:.1f} s",
        f"under {DEMO_SECONDS} s",
        seconds < DEMO_SECONDS,
    )


def start(back: Path, folder: Path) -> Iterator[Goal]:
    """The start of an airlock, and its memory then."""
    found = starts(back, folder, STARTS)
    ready = statistics.median(each.seconds for each in found) * 1000
    cpu = statistics.median(each.cpu_seconds for each in found) * 1000
    own = statistics.median(each.own for each in found)
    yield Goal(
        "the start, until ready",
        f"{ready:.0f} ms, {cpu:.0f} ms of CPU time",
        f"at most {READY_MS} ms",
        ready <= READY_MS,
    )
    yield Goal(
        "memory of its own when ready",
        f"{own / MIB:.1f} MiB",
        f"at most {OWN_LIMIT // MIB} MiB",
        own <= OWN_LIMIT,
    )


@contextmanager
def an_airlock(
    back: Path, folder: Path, *options: str
) -> Iterator[tuple[Process, Path]]:
    front = folder / "goal.sock"
    with airlock(back, front, *options) as proxy:
        yield proxy, front


def idle(back: Path, folder: Path) -> Iterator[Goal]:
    """A guest is connected, has used its disk, and makes no more requests."""
    with an_airlock(back, folder) as (proxy, front), BlkGuest() as guest:
        guest.connect(str(front))
        guest.start()
        buffer = guest.ram.alloc(4 * KIB)
        for sector in range(100):
            guest.read(sector, [(buffer, 4 * KIB)])
        time.sleep(1.0)  # it may go on for a moment
        watched = Watched(proxy.pid)
        before = watched.switches(), watched.cpu_ns()
        time.sleep(IDLE)
        after = watched.switches(), watched.cpu_ns()
        count = sum(after[0]) - sum(before[0])
        spent = (after[1] - before[1]) / 1000
        yield Goal(
            f"idle for {IDLE:.0f} s",
            f"{count} context switches, {spent:.0f} us of CPU time",
            "none",
            count == 0 and spent == 0,
        )
        yield resident("memory, idle", proxy)
        guest.stop()


def resident(name: str, proxy: Process) -> Goal:
    rss, own = memory_of(proxy.pid)
    return Goal(
        name,
        f"{rss / MIB:.1f} MiB resident, {own / MIB:.1f} of it its own",
        f"under {RSS_LIMIT // MIB} MiB",
        rss < RSS_LIMIT,
    )


def rings(back: Path, folder: Path) -> Iterator[Goal]:
    """The same number of requests in flight, over more and more rings."""
    plans = {
        f"{count} rings, {IN_FLIGHT} requests of 4 KiB in flight": LoadPlan(
            depth=IN_FLIGHT // count, queues=count, seconds=SECONDS, warmup=0.3
        )
        for count in RINGS
    }
    costs, goals = compared(back, folder, plans)
    yield from goals
    growth = costs[-1] / costs[0]
    times = RINGS[-1] // RINGS[0]
    yield Goal(
        f"cost of {RINGS[-1]} rings to that of {RINGS[0]}",
        f"{growth:.1f} times",
        f"at most {times} times",
        growth <= times,
    )


def guest_memory(back: Path, folder: Path) -> Iterator[Goal]:
    """The same load in larger and larger guests, whose memory is hardly touched."""
    plans = {
        f"guest of {name}, 32 requests of 4 KiB in flight": LoadPlan(
            depth=32, ram=size, seconds=SECONDS, warmup=0.3
        )
        for name, size in RAM.items()
    }
    costs, goals = compared(back, folder, plans)
    yield from goals
    growth = costs[-1] / costs[0]
    yield Goal(
        f"cost in a guest of {list(RAM)[-1]} to that in {next(iter(RAM))}",
        f"{growth:.2f} times",
        f"at most {TOLERANCE} times",
        growth <= TOLERANCE,
    )


def compared(
    back: Path, folder: Path, plans: Mapping[str, LoadPlan]
) -> tuple[list[float], list[Goal]]:
    """Put loads in turn on airlocks that never poll: their costs, as medians."""
    found: dict[str, list[Cost]] = {name: [] for name in plans}
    for _ in range(ROUNDS):
        for name, plan in plans.items():
            with an_airlock(back, folder, "--poll-us=0") as (proxy, front):
                wait_for_quiet(MOMENT)
                found[name].append(cost(proxy, front, plan))
    costs = [statistics.median(each.cpu_us for each in found[name]) for name in plans]
    goals = [
        Goal(
            f"{name}, blocking",
            f"{each:.2f} us of CPU time each,"
            f" {statistics.median(one.iops for one in found[name]):,.0f} IOPS,"
            f" {max(one.resident for one in found[name]) / MIB:.1f} MiB resident",
        )
        for name, each in zip(plans, costs, strict=True)
    ]
    return costs, goals


@dataclass(frozen=True)
class Cost:
    """The cost of a load for an airlock."""

    cpu_us: float
    """CPU time for a request."""
    resident: int
    iops: float


def cost(proxy: Process, front: Path, plan: LoadPlan) -> Cost:
    """Measure it."""
    watched = {"airlock": Watched(proxy.pid)}
    found: list[LoadResult] = []
    load = threading.Thread(target=lambda: found.append(measure(str(front), plan)))
    load.start()
    samples = []
    while load.is_alive():
        samples.append((take_sample(watched), memory_of(proxy.pid)[0]))
        load.join(0.02)
    if not found:
        raise BenchError("a load failed")
    (result,) = found
    end = result.begin_ns + int(plan.seconds * 1e9)
    inside = [each for each in samples if result.begin_ns <= each[0].at <= end]
    if len(inside) < 2:
        raise BenchError(f"{len(inside)} samples in a run: too busy to measure")
    (first, _), (last, resident) = inside[0], inside[-1]
    spent = last.cpu["airlock"] - first.cpu["airlock"]
    requests = (last.at - first.at) / 1e9 * result.iops
    return Cost(spent / 1000 / requests, resident, result.iops)


def packets() -> Iterator[Goal]:
    """Small packets through the pump alone, to the back and back, without waits."""
    for segments in SEGMENTS:
        found = packet_ns(World(), segments)
        yield Goal(
            f"packet of {sum(segments) - HEADER} bytes in {len(segments)} descriptors,"
            " pump alone",
            f"{min(found):.0f} ns each at best, {statistics.median(found):.0f} mostly",
            f"at most {PACKET_NS} ns",
            min(found) <= PACKET_NS,
        )


def packet_ns(world: World, segments: Sequence[int]) -> list[float]:
    """The time of a packet, once for each batch."""
    lane = Lane(world, size=RING, policy="used", whole_batches=True)
    found = []
    for _ in range(BATCHES):
        for i in range(RING // len(segments)):
            at = i % WARM * 4 * KIB
            ends = itertools.accumulate(segments, initial=at)
            lane.driver.offer(list(map(Buffer, ends, segments)))
        lane.driver.publish()
        count, there = timed(lane.pump)
        while (chain := lane.device.take()) is not None:
            lane.device.complete(chain.head, 0)
        lane.device.publish()
        done, back = timed(lane.pump)
        if count != RING // len(segments) or done != count:
            raise BenchError(f"{count} packets went to the back, {done} came back")
        lane.used()
        found.append((there + back) / count)
    return found


def timed(pump: Pump) -> tuple[int, int]:
    """Return (chains that a step moves, its time in ns)."""
    begin = time.perf_counter_ns()
    moved = pump.step()[0]
    return moved, time.perf_counter_ns() - begin


def copying() -> Iterator[Goal]:
    """The time of memcpy, to compare with the time of copying requests."""
    with mmap.mmap(-1, 2 * COLD) as memory:
        memory[:] = bytes(2 * COLD)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        hot = copies(start, start + COLD, step=0)
        cold = copies(start, start + COLD, step=COPY)
    for name, each in (("caches warm", hot), ("caches cold", cold)):
        yield Goal(
            f"memcpy of 64 KiB, {name}",
            f"{each / 1000:.2f} us, {COPY / each:.1f} GB/s",
        )


def copies(source: int, target: int, step: int) -> float:
    """The time of one copy in ns, without that of the call: the best of several."""
    count = COLD // COPY

    def once(size: int) -> int:
        begin = time.perf_counter_ns()
        for i in range(count):
            ctypes.memmove(target + i * step, source + i * step, size)
        return time.perf_counter_ns() - begin

    return (min(once(COPY) for _ in range(3)) - min(once(0) for _ in range(3))) / count


def as_text(goals: Iterable[Goal]) -> str:
    lines = []
    for goal in goals:
        verdict = (
            f"  [{'' if goal.met else 'NOT '}{goal.wanted}]" if goal.wanted else ""
        )
        lines.append(f"{goal.name:<62} {goal.found}{verdict}")
    return "\n".join(lines)
