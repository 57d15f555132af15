# SPDX-License-Identifier: Apache-2.0
"""The load: what it asks of a device, what it counts, and how it ends."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vhost_airlock.errors import Disconnected, SessionError, Stopped
from vhost_airlock.peers.blk_load import (
    LoadPlan,
    LoadResult,
    measure,
    percentile,
)
from vhost_airlock.peers.blk_process import BlkProcess
from vhost_airlock.peers.device import DeviceRing
from vhost_airlock.peers.disk import HEADER, SECTOR
from vhost_airlock.peers.load import Load, private_size
from vhost_airlock.peers.ram import MIB
from vhost_airlock.peers.ring import Buffer, RingFault, SplitLayout, SplitRing
from vhost_airlock.vhost.fds import Fd, eventfd, notify

QUEUE = 64
BASE = 65530
"""So that the index wraps round."""
PRIVATE, DATA = 0x10000, 0x20000
"""Guest addresses of the two areas."""
PATIENCE = 30.0
FOR_EVER = 1 << 62

Complete = Callable[[DeviceRing, int], None]


def well(ring: DeviceRing, head: int) -> None:
    ring.complete(head, 1)


class Bench:
    """A load on a ring in plain memory, and a device that serves it in this thread."""

    def __init__(self, **changes: Any) -> None:
        self.fds = [eventfd() for _ in range(3)]
        self.kick, self.call, self.err = self.fds
        ours, self.theirs = socket.socketpair()
        self.connection = Fd(ours.detach())
        options: dict[str, Any] = {
            "queue_size": QUEUE,
            "base": BASE,
            "event_idx": True,
            "indirect": True,
            "depth": 4,
            "size": 8192,
            "segment": 4096,
            "write": False,
            "random_order": False,
            "first": 10,
            "blocks": 5,
            "seed": 1,
            "busy_wait": False,
        }
        options |= changes
        layout = SplitLayout(options["queue_size"])
        words = memoryview(bytearray(layout.end))
        depth, size, segment = (options[name] for name in ("depth", "size", "segment"))
        self.private = memoryview(bytearray(private_size(depth, size, segment)))
        self.thread = threading.Thread(target=self._run)
        data = bytearray(options.pop("span", depth * size))
        try:
            self.load = Load(
                ring=words,
                private=(self.private, PRIVATE),
                data=(data, DATA),
                kick=self.kick.fileno(),
                call=self.call.fileno(),
                err=self.err.fileno(),
                connection=self.connection.fileno(),
                **options,
            )
        except ValueError:
            self.close_fds()
            raise
        self.ring = DeviceRing(
            SplitRing.at(words, layout),
            self.view,
            base=options["base"],
            event_idx=options["event_idx"],
        )
        self.error: BaseException | None = None

    def _run(self) -> None:
        try:
            self.load.run(0, FOR_EVER)
        except Exception as error:
            self.error = error

    def view(self, addr: int, length: int) -> memoryview:
        """The bytes at a guest address of the private area."""
        return self.private[addr - PRIVATE : addr - PRIVATE + length]

    def serve(
        self, count: int, complete: Complete = well, status: int | None = 0
    ) -> list[tuple[int, int, list[Buffer]]]:
        """Serve so many requests: kinds, sectors and buffers of their data."""
        found: list[tuple[int, int, list[Buffer]]] = []
        deadline = time.monotonic() + PATIENCE
        while len(found) < count and time.monotonic() < deadline:
            while len(found) < count and (chain := self.ring.take()):
                header, *data, end = chain.buffers
                assert header[1:] == (HEADER.size, False)
                assert end[1:] == (1, True)
                kind, _, sector = HEADER.unpack(self.view(header.addr, header.length))
                found.append((kind, sector, data))
                if status is not None:
                    self.view(end.addr, 1)[0] = status
                complete(self.ring, chain.head)
            self.ring.publish()
            if self.ring.call_needed():
                notify(self.call)
            self.ring.arm()
        assert len(found) == count
        return found

    def end(self) -> BaseException | None:
        """The exception of the load, if it may end by itself."""
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        return self.error

    def close(self) -> None:
        self.load.stop()
        if self.thread.ident is not None:
            self.thread.join(PATIENCE)
        self.close_fds()

    def close_fds(self) -> None:
        self.theirs.close()
        for fd in (*self.fds, self.connection):
            fd.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Bench]]:
    benches = []

    def start(**changes: Any) -> Bench:
        benches.append(Bench(**changes))
        benches[-1].thread.start()
        return benches[-1]

    yield start
    for bench in benches:
        bench.close()


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
def test_asks_for_block_after_block(start, write, event_idx, indirect):
    bench = start(write=write, event_idx=event_idx, indirect=indirect)
    found = bench.serve(100)
    # Blocks 10 to 14, of 16 sectors, again and again.
    assert [sector for _, sector, _ in found] == [
        (10 + i % 5) * 16 for i in range(len(found))
    ]
    assert {kind for kind, _, _ in found} == {int(write)}
    # Four requests at a time, each with its own 8 KiB in two pieces.
    places = {tuple(buffer.addr for buffer in data) for _, _, data in found}
    assert places == {(DATA + at, DATA + at + 4096) for at in (0, 8192, 16384, 24576)}
    assert {buffer[1:] for _, _, data in found for buffer in data} == {
        (4096, not write)
    }


def test_asks_at_random_all_over_the_device(start):
    found = start(random_order=True).serve(400)
    blocks = [sector // 16 for _, sector, _ in found]
    assert set(blocks) == set(range(10, 15))
    assert blocks != sorted(blocks)


def test_last_piece_may_be_shorter(start):
    (_, _, data), *_ = start(size=7168, segment=4096).serve(4)
    assert [buffer.length for buffer in data] == [4096, 3072]


def test_requests_walk_through_the_memory_they_have(start):
    """Three places for each of four requests, which never share one."""
    found = start(span=4 * 3 * 8192, segment=8192).serve(240)
    by_place: dict[int, int] = {}
    for _, _, [buffer] in found:
        by_place[buffer.addr] = by_place.get(buffer.addr, 0) + 1
    assert sorted(by_place) == [DATA + at * 8192 for at in range(12)]
    assert max(by_place.values()) - min(by_place.values()) <= 1


def test_counts_what_was_done_and_how_long_it_took(start):
    bench = start()
    bench.serve(100)
    bench.load.stop()
    assert isinstance(bench.end(), Stopped)
    counters = bench.load.counters()
    latencies = bench.load.latencies()
    # The last ones may not have been looked at before it was told to stop.
    assert 96 <= counters["requests"] <= 100
    assert sum(latencies.values()) == counters["requests"]
    assert max(latencies) <= counters["slowest"] < max(latencies) * 17 / 16 + 1


def test_counts_kicks_and_calls(start):
    """One request at a time, for a device that wants a kick for each."""
    bench = start(depth=1, event_idx=False)
    for _ in range(50):
        bench.serve(1)
    bench.load.stop()
    bench.end()
    counters = bench.load.counters()
    assert counters["kicks"] == counters["requests"] >= 49
    assert 1 <= counters["calls"] <= 50
    assert counters["sleeps"] >= counters["calls"]


def test_busy_wait_wants_no_calls(start):
    bench = start(busy_wait=True)
    bench.serve(100)
    bench.load.stop()
    bench.end()
    counters = bench.load.counters()
    assert (counters["calls"], counters["sleeps"]) == (0, 0)


@pytest.mark.parametrize("status", [1, 2, None])
def test_failed_request_ends_it(start, status):
    """One that no status was written for has failed too, also after good ones."""
    bench = start()
    bench.serve(8)
    bench.serve(1, status=status)
    assert isinstance(bench.end(), SessionError)
    assert "failed" in str(bench.error)


@pytest.mark.parametrize("head", [4, QUEUE, 0xFFFFFFFF])
def test_completion_of_what_is_not_there_ends_it(start, head):
    bench = start()
    bench.serve(1, lambda ring, _: ring.complete(head))
    assert "not in flight" in str(bench.end())


def test_completion_of_the_middle_of_a_chain_ends_it(start):
    bench = start(indirect=False)
    bench.serve(1, lambda ring, head: ring.complete(head + 1))
    assert "not in flight" in str(bench.end())


def test_second_completion_ends_it(start):
    def twice(ring: DeviceRing, head: int) -> None:
        ring.complete(head)
        ring.complete(head)
        ring.complete(head)
        ring.complete(head)

    bench = start(depth=1)
    bench.serve(1, twice)
    # The first is taken, and asks again; so the second may be one too early.
    assert isinstance(bench.end(), SessionError)


def test_broken_ring_ends_it(start):
    bench = start()
    notify(bench.err)
    assert isinstance(bench.end(), RingFault)


def test_device_that_hangs_up_ends_it(start):
    bench = start()
    bench.theirs.close()
    assert isinstance(bench.end(), Disconnected)


@pytest.mark.parametrize(
    "changes",
    [{"depth": 0}, {"depth": 17, "indirect": False}, {"blocks": 0}, {"span": 8191}],
)
def test_load_that_can_not_be_is_refused(changes):
    with pytest.raises(ValueError, match="requests"):
        Bench(**changes)


def test_closed_load_is_not_run():
    bench = Bench()
    bench.load.close()
    with pytest.raises(ValueError, match="closed"):
        bench.load.run(0, 0)
    bench.close()


# The whole guest, with the block back-end in a process of its own.


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


@pytest.fixture
def path(tmp_path: Path, image: Path) -> Iterator[str]:
    with BlkProcess(str(image), str(tmp_path / "blk.sock"), num_queues=2) as back:
        yield back.path


@pytest.mark.parametrize("indirect", [False, True])
def test_two_queues_write_all_of_a_disk(path, image, indirect):
    """A disk of 256 blocks; a block gets what its request had in memory."""
    plan = LoadPlan("write", depth=4, queues=2, indirect=indirect, seconds=1.0)
    result = measure(path, plan)
    assert result.indirect == indirect
    assert result.requests > 256
    assert result.iops == result.requests
    assert sum(result.latencies.values()) == result.requests
    content = image.read_bytes()
    words = {content[at : at + 8] for at in range(0, MIB, 4096)}
    assert len(words) == 8, "four requests in each of two queues had a page each"
    assert bytes(8) not in words


def test_guest_memory_costs_nothing_if_untouched(path):
    result = measure(path, LoadPlan(ram=1 << 40, seconds=0.05, warmup=0))
    assert result.requests


def test_read_only_disk_is_not_written(image, tmp_path):
    before = image.read_bytes()
    with (
        BlkProcess(str(image), str(tmp_path / "ro.sock"), read_only=True) as back,
        pytest.raises(SessionError, match="read-only"),
    ):
        measure(back.path, LoadPlan("randwrite"))
    assert image.read_bytes() == before


def test_disk_that_is_too_small_is_refused(image, path):
    os.truncate(image, SECTOR)
    with pytest.raises(SessionError, match="too small"):
        measure(path, LoadPlan(size=2 * MIB))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "trim"}, "trim"),
        ({"size": 1000}, "1000 bytes"),
        ({"size": 0}, "0 bytes"),
        ({"segment": 100}, "can't cut"),
        ({"size": MIB, "segment": 512}, "can't cut"),
        ({"depth": 0}, "0 requests"),
        ({"depth": 1000}, "1000 requests"),
    ],
)
def test_plans_that_make_no_sense(changes, said):
    with pytest.raises(ValueError, match=said):
        LoadPlan(**changes)


# Figures.


def test_percentiles():
    counts = {300: 1, 100: 50, 200: 49}
    assert percentile(counts, 0.5) == 100
    assert percentile(counts, 0.51) == 200
    assert percentile(counts, 0.99) == 200
    assert percentile(counts, 0.999) == 300
    assert percentile({}, 0.5) == 0


def test_result_is_for_each_request():
    result = LoadResult(
        begin_ns=0,
        seconds=0.5,
        size=4096,
        indirect=True,
        requests=1000,
        kicks=20,
        calls=10,
        sleeps=30,
        cpu_ns=3_000_000,
        slowest_ns=70_000,
        latencies={50_000: 990, 64_000: 10},
    )
    said = result.as_dict()
    assert said["iops"] == 2000
    assert said["mb_per_s"] == pytest.approx(8.19)
    assert said["cpu_us"] == pytest.approx(3.0)
    assert said["latency_us"] == {"p50": 50.0, "p99": 50.0, "p999": 64.0, "max": 70.0}
    assert result.per_request(result.kicks) == pytest.approx(0.02)
