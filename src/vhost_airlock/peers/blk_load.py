# SPDX-License-Identifier: Apache-2.0
"""A load on a block device, and its measurements: a guest that only makes requests.

It connects as BlkGuest does; then compiled code drives the rings, a thread for each.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..errors import AirlockError, SessionError
from ..vhost.wire import Feature, ProtocolFeature
from .disk import SECTOR, BlkFeature
from .guest import BlkGuest
from .guest_queue import GuestQueue
from .load import Load, private_size
from .ram import MIB, GuestRam
from .ring import MAX_SIZE, SplitLayout

MODES = ("randread", "randwrite", "read", "write")
BUFFER_ALIGN = 4096
MAX_SEGMENTS = 126


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The requests of a load, and its time."""

    mode: str = "randread"
    size: int = 4096
    """Bytes of a request."""
    depth: int = 1
    """Requests in flight in each queue."""
    queues: int = 1
    indirect: bool = True
    """Descriptors in tables, if the device can do that."""
    busy_wait: bool = False
    """Spin for completions, and take no calls."""
    segment: int = 0
    """Bytes of each piece of a request's data; 0: all in one."""
    span: int = 0
    """Bytes of memory, for each queue, that its requests walk through; 0: as few as
    they need, which stay in the processor's caches."""
    ram: int = 0
    """Bytes of guest memory; 0: as many as needed. Untouched memory costs nothing."""
    warmup: float = 0.1
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode} is none of {', '.join(MODES)}")
        if self.size < SECTOR or self.size % SECTOR:
            raise ValueError(f"requests of {self.size} bytes are no whole sectors")
        if self.segment % SECTOR or self.segments > MAX_SEGMENTS:
            raise ValueError(f"can't cut {self.size} bytes into {self.segment}")
        if self.depth < 1 or self.queue_size > MAX_QUEUE:
            raise ValueError(f"{self.depth} requests don't fit into a queue")

    @property
    def random_order(self) -> bool:
        return self.mode.startswith("rand")

    @property
    def piece(self) -> int:
        return self.segment or self.size

    @property
    def segments(self) -> int:
        return -(-self.size // self.piece)

    @property
    def queue_size(self) -> int:
        """Large enough also if the device knows of no indirect descriptors."""
        return max(128, 1 << (self.depth * (self.segments + 2) - 1).bit_length())

    @property
    def data_size(self) -> int:
        """Memory for the data of a queue's requests."""
        return max(self.span, self.depth * self.size)


MAX_QUEUE = min(MAX_SIZE, 1024)
"""The most entries of a ring: many devices refuse more."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The results of a load. Counts are those of all queues together."""

    begin_ns: int
    """The time when measuring began, by the monotonic clock."""
    seconds: float
    size: int
    indirect: bool
    requests: int
    kicks: int
    """Notifications that the device wanted."""
    calls: int
    """Notifications that it sent."""
    sleeps: int
    """Times that the driver waited for a call."""
    cpu_ns: int
    slowest_ns: int
    latencies: Mapping[int, int] = field(repr=False)
    """For a time in nanoseconds, the number of requests that took it."""

    @property
    def iops(self) -> float:
        return self.requests / self.seconds

    @property
    def mb_per_s(self) -> float:
        return self.iops * self.size / 1e6

    def per_request(self, count: float) -> float:
        return count / self.requests if self.requests else 0.0

    @property
    def cpu_us(self) -> float:
        """CPU time of the queues' threads for a request."""
        return self.per_request(self.cpu_ns) / 1000

    def percentile_us(self, share: float) -> float:
        """The time in which this share of requests was done."""
        return percentile(self.latencies, share) / 1000

    def as_dict(self) -> dict[str, object]:
        return {
            "iops": round(self.iops, 1),
            "mb_per_s": round(self.mb_per_s, 2),
            "latency_us": {
                "p50": self.percentile_us(0.5),
                "p99": self.percentile_us(0.99),
                "p999": self.percentile_us(0.999),
                "max": self.slowest_ns / 1000,
            },
            "cpu_us": round(self.cpu_us, 3),
            "requests": self.requests,
            "kicks": self.kicks,
            "calls": self.calls,
            "sleeps": self.sleeps,
            "indirect": self.indirect,
            "seconds": self.seconds,
            "begin_ns": self.begin_ns,
        }


def percentile(counts: Mapping[int, int], share: float) -> int:
    """Return the least value that at least this share of the counts doesn't exceed."""
    wanted = share * sum(counts.values())
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= wanted:
            return value
    return 0


def measure(path: str, plan: LoadPlan) -> LoadResult:
    """Connect to a device, put a load on it, and leave."""
    with loaded(path, plan) as (guest, loads):
        begin = time.monotonic_ns() + int(plan.warmup * 1e9)
        end = begin + int(plan.seconds * 1e9)
        _run_all(loads, begin, end)
        guest.stop()
        indirect = bool(guest.features & Feature.INDIRECT_DESC)
        return _result(loads, plan, begin, indirect)


@contextmanager
def loaded(
    path: str, plan: LoadPlan, also: Collection[ProtocolFeature] = ()
) -> Iterator[tuple[BlkGuest, list[Load]]]:
    """Connect to a device, start its rings, and have the load of each ready to run.

    `also` are protocol features that the guest uses beside its usual ones.
    """
    data_size = plan.data_size * plan.queues
    needed = data_size + 64 * MIB + plan.queues * 16 * MIB
    ram = GuestRam(high=max(plan.ram, needed))
    without = [] if plan.indirect else [Feature.INDIRECT_DESC]
    with BlkGuest(
        ram=ram,
        num_queues=plan.queues,
        queue_size=plan.queue_size,
        seg_max=plan.segments,
        without=without,
        also=also,
    ) as guest:
        guest.connect(path)
        if "write" in plan.mode and guest.features & BlkFeature.RO:
            raise SessionError("the device is read-only")
        # Sequential queues keep to stripes of their own; random ones are everywhere.
        blocks = guest.capacity * SECTOR // plan.size
        share = blocks if plan.random_order else blocks // plan.queues
        if not share:
            raise SessionError(f"a device of {guest.capacity} sectors is too small")
        loads = [_load(guest, queue, plan, share) for queue in guest.queues]
        try:
            guest.start()
            yield guest, loads
        finally:
            for load in loads:
                load.close()


def _load(guest: BlkGuest, queue: GuestQueue, plan: LoadPlan, blocks: int) -> Load:
    """Take over a queue of a guest that is connected, and has not started."""
    ring = guest.ram.view(queue.ring_addr, SplitLayout(queue.size).end)
    private = private_size(plan.depth, plan.size, plan.piece)
    private_addr = guest.ram.alloc(private)
    data_addr = guest.ram.alloc(plan.data_size, BUFFER_ALIGN)
    data = guest.ram.view(data_addr, plan.data_size)
    # Every page is allocated before measuring, and no two have the same content.
    for at in range(0, plan.data_size, BUFFER_ALIGN):
        data[at : at + 8] = (data_addr + at).to_bytes(8, "little")
    return Load(
        ring=ring,
        queue_size=queue.size,
        base=queue.base,
        event_idx=bool(guest.features & Feature.EVENT_IDX),
        indirect=bool(guest.features & Feature.INDIRECT_DESC),
        private=(guest.ram.view(private_addr, private), private_addr),
        data=(data, data_addr),
        depth=plan.depth,
        size=plan.size,
        segment=plan.piece,
        write="write" in plan.mode,
        random_order=plan.random_order,
        first=0 if plan.random_order else blocks * queue.index,
        blocks=blocks,
        seed=queue.index,
        kick=queue.kick_fd.fileno(),
        call=queue.call_fd.fileno(),
        err=queue.err_fd.fileno(),
        connection=guest.front.fileno(),
        busy_wait=plan.busy_wait,
    )


def _run_all(loads: list[Load], begin: int, end: int) -> None:
    """Run all queues, each in a thread; when one fails all stop."""
    errors: list[AirlockError] = []

    def run(load: Load) -> None:
        try:
            load.run(begin, end)
        except AirlockError as error:
            errors.append(error)
            for other in loads:
                other.stop()

    threads = [
        threading.Thread(target=run, args=[load], name=f"load-{number}")
        for number, load in enumerate(loads)
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:  # an interrupt
        for load in loads:
            load.stop()
        for thread in threads:
            thread.join()
        raise
    if errors:
        raise errors[0]


def _result(
    loads: list[Load], plan: LoadPlan, begin: int, indirect: bool
) -> LoadResult:
    sums: Counter[str] = Counter()
    latencies: Counter[int] = Counter()
    slowest = 0
    for load in loads:
        counters = load.counters()
        slowest = max(slowest, counters.pop("slowest"))
        sums.update(counters)
        latencies.update(load.latencies())
    return LoadResult(
        begin_ns=begin,
        seconds=plan.seconds,
        size=plan.size,
        indirect=indirect,
        requests=sums["requests"],
        kicks=sums["kicks"],
        calls=sums["calls"],
        sleeps=sums["sleeps"],
        cpu_ns=sums["cpu"],
        slowest_ns=slowest,
        latencies=dict(latencies),
    )
