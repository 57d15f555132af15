# SPDX-License-Identifier: Apache-2.0
"""I6: whatever the guest writes into a ring, that ring breaks, and nothing else."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.airlock import Airlock
from tests.support.backs import DiskBack, ScriptedBack, readable
from tests.support.sessions import (
    LATE,
    await_reaped,
    errors,
    serve,
    small_guest,
    wait_for_errors,
)
from vhost_airlock.peers.disk import BlkStatus, BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.ram import HIGH, MIB
from vhost_airlock.peers.ring import (
    DESC,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    SplitRing,
)
from vhost_airlock.vhost.fds import drain, notify
from vhost_airlock.vhost.wire import Feature

LOW_END = 64 * MIB
"""Where guest memory has a hole."""
POOL = 4 * MIB


class Scene:
    """Two rings that run, of which the first is about to break."""

    def __init__(self, airlock: Airlock, back: ScriptedBack, guest: BlkGuest) -> None:
        self.airlock = airlock
        self.back = back
        self.guest = guest
        self.page = guest.ram.alloc(8192)

    @property
    def ring(self) -> SplitRing:
        return self.guest.queues[0].driver.ring

    def chain(self, *descriptors: tuple[int, int, int, int], head: int = 0) -> None:
        """Write descriptors from number 8 on, and offer the one that is named."""
        for i, (addr, length, flags, next_) in enumerate(descriptors):
            self.ring.write_desc(8 + i, addr, length, flags, next_)
        self.offer(8 + head)

    def table(self, *descriptors: tuple[int, int, int, int], length: int = 0) -> None:
        """Offer an indirect table."""
        memory = self.guest.ram.view(self.page, 4096)
        for i, descriptor in enumerate(descriptors):
            DESC.pack_into(memory, 16 * i, *descriptor)
        self.chain((self.page, length or 16 * len(descriptors), DESC_F_INDIRECT, 0))

    def offer(self, head: int) -> None:
        ring = self.ring
        ring.set_avail_entry(ring.avail_idx & ring.mask, head)
        ring.fence()
        ring.avail_idx = (ring.avail_idx + 1) & 0xFFFF
        notify(self.guest.queues[0].kick_fd)


@pytest.fixture
def scene() -> Iterator[Scene]:
    back = ScriptedBack()
    with (
        Airlock(back, drain_timeout=0.2, pool_limit=POOL, request_limit=0) as airlock,
        small_guest() as guest,
    ):
        guest.connect(airlock.channel())
        guest.start()
        serve(back, guest)
        serve(back, guest, 1)
        yield Scene(airlock, back, guest)


N, W, T = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT
P = 0x10000
"""A page that is always there."""

ATTACKS: dict[str, tuple[Callable[[Scene], None], str]] = {
    "index beyond the ring": (
        lambda s: set_avail(s, 17),
        "the guest's avail index jumps by more than the ring holds",
    ),
    "index far beyond the ring": (lambda s: set_avail(s, 0x8000), "avail index jumps"),
    "index that goes back": (lambda s: set_avail(s, -1), "avail index jumps"),
    "head beyond the ring": (lambda s: s.offer(16), "a head .* is beyond the ring"),
    "head far beyond": (lambda s: s.offer(0xFFFF), "a head .* is beyond the ring"),
    "next beyond the ring": (
        lambda s: s.chain((P, 1, N, 16)),
        "a descriptor's next is beyond its table",
    ),
    "loop of one": (lambda s: s.chain((P, 1, N, 8)), "a chain has a loop"),
    "loop of two": (
        lambda s: s.chain((P, 1, N, 9), (P, 1, N, 8)),
        "a chain has a loop",
    ),
    "address in a hole": (
        lambda s: s.chain((LOW_END, 16, 0, 0)),
        "outside of the guest's memory",
    ),
    "end in a hole": (
        lambda s: s.chain((LOW_END - 8, 16, 0, 0)),
        "outside of the guest's memory",
    ),
    "address of nothing": (
        lambda s: s.chain((1 << 60, 16, 0, 0)),
        "outside of the guest's memory",
    ),
    "isolated memory's address": (
        lambda s: s.chain((1 << 46, 16, 0, 0)),
        "outside of the guest's memory",
    ),
    "address that wraps": (
        lambda s: s.chain(((1 << 64) - 8, 16, 0, 0)),
        "outside of the guest's memory",
    ),
    "everything": (
        lambda s: s.chain((0, 0xFFFFFFFF, W, 0)),
        "outside of the guest's memory|a request has 4294967295 bytes",
    ),
    "writable in a hole": (
        lambda s: s.chain((P, 16, N, 9), (LOW_END, 1, W, 0)),
        "outside of the guest's memory",
    ),
    "readable after writable": (
        lambda s: s.chain((P, 1, W | N, 9), (P, 1, 0, 0)),
        "a descriptor to read from follows one to write to",
    ),
    "nothing at all": (lambda s: s.chain((P, 0, 0, 0)), "a chain has no bytes at all"),
    "nothing, twice": (
        lambda s: s.chain((P, 0, N, 9), (P, 0, W, 0)),
        "a chain has no bytes at all",
    ),
    "larger than the pool": (
        lambda s: s.chain((HIGH, POOL + 1, W, 0)),
        f"a request has {POOL + 1} bytes, and those with more than {POOL} are not",
    ),
    "more than 32 bits": (
        lambda s: s.table(*[(HIGH, 128 * MIB, W | N, i + 1) for i in range(40)]),
        r"a chain has more than 2\^32 - 1 bytes",
    ),
    "table of no bytes": (
        lambda s: s.chain((s.page, 0, T, 0)),
        "indirect descriptor is malformed",
    ),
    "table of a part": (lambda s: s.chain((s.page, 15, T, 0)), "indirect .* malformed"),
    "table of one and a part": (lambda s: s.chain((s.page, 24, T, 0)), "malformed"),
    "table of 4 GiB": (lambda s: s.chain((P, 0xFFFFFFF0, T, 0)), "malformed"),
    "table and next": (lambda s: s.chain((s.page, 16, T | N, 9)), "malformed"),
    "table in a hole": (
        lambda s: s.chain((LOW_END - 16, 32, T, 0)),
        "outside of the guest's memory",
    ),
    "table in a table": (
        lambda s: s.table((P, 16, T, 0)),
        "an indirect table holds an indirect descriptor",
    ),
    "loop in a table": (lambda s: s.table((P, 1, N, 1), (P, 1, N, 0)), "has a loop"),
    "next beyond the table": (
        lambda s: s.table((P, 1, N, 1), (P, 1, N, 2)),
        "next is beyond its table",
    ),
    "last of the table has a next": (
        lambda s: s.table((P, 1, N, 1), (P, 1, N, 0xFFFF)),
        "next is beyond its table",
    ),
}


def set_avail(scene: Scene, jump: int) -> None:
    scene.ring.avail_idx = (scene.ring.avail_idx + jump) & 0xFFFF
    notify(scene.guest.queues[0].kick_fd)


def assert_only_the_ring_is_broken(scene: Scene) -> None:
    """The front has been told; the other ring is served; this one can be started anew
    and is as good as ever."""
    guest, back = scene.guest, scene.back
    queue = guest.queues[0]
    assert readable(queue.err_fd)
    drain(queue.err_fd)
    for _ in range(3):
        serve(back, guest, 1)
    assert not readable(queue.err_fd, 0), "told once"
    assert not readable(guest.queues[1].err_fd, 0)
    guest.front.barrier()
    guest.stop()
    queue.reset()
    guest.start()
    serve(back, guest)
    serve(back, guest, 1)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=list(ATTACKS))
def test_i6_bad_ring_breaks_alone(
    scene: Scene,
    attack: tuple[Callable[[Scene], None], str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    act, reason = attack
    act(scene)
    (line,) = wait_for_errors(caplog)
    assert re.search(f"^ring 0 is broken: .*({reason})", line)
    assert scene.back.ring().take() is None, "nothing of it reaches the back"
    assert_only_the_ring_is_broken(scene)
    assert len(errors(caplog)) == 1


def test_i6_head_may_not_be_offered_twice(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """While it is in flight. The first one ends as it should."""
    guest, back = scene.guest, scene.back
    queue = guest.queues[0]
    io = queue.submit(BlkType.FLUSH)
    queue.kick()
    chain = back.take()
    (head,) = queue.driver.outstanding
    scene.offer(head)
    assert wait_for_errors(caplog) == [
        "ring 0 is broken: the guest offered a head that is still in flight:"
        f" {head} of {queue.size}"
    ]
    back.complete(chain)
    await_reaped(queue)
    assert io.status == BlkStatus.OK
    assert_only_the_ring_is_broken(scene)


def test_i6_table_that_was_not_negotiated_breaks_the_ring(
    caplog: pytest.LogCaptureFixture,
) -> None:
    back = ScriptedBack()
    with (
        Airlock(back) as airlock,
        BlkGuest(
            num_queues=2, queue_size=16, seg_max=14, without=[Feature.INDIRECT_DESC]
        ) as guest,
    ):
        guest.connect(airlock.channel())
        guest.start()
        scene = Scene(airlock, back, guest)
        scene.table((P, 16, 0, 0))
        (line,) = wait_for_errors(caplog)
        assert "an indirect descriptor is malformed or was not negotiated" in line
        assert line.endswith(": head 8, flags 0x4, 16 bytes")
        assert_only_the_ring_is_broken(scene)


def test_i6_what_went_before_a_bad_chain_is_served(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    guest, back = scene.guest, scene.back
    queue = guest.queues[0]
    ios = [queue.submit(BlkType.FLUSH) for _ in range(3)]
    queue.driver.publish()
    scene.chain((LOW_END, 16, 0, 0))
    wait_for_errors(caplog)
    for _ in ios:
        back.complete(back.take())
    while queue.pending:
        await_reaped(queue)
    assert [io.status for io in ios] == [BlkStatus.OK] * 3
    assert_only_the_ring_is_broken(scene)


def test_i6_broken_ring_can_be_broken_again_and_again(scene: Scene) -> None:
    for _ in range(20):
        scene.offer(0xFFFF)
        assert_only_the_ring_is_broken(scene)


def test_i6_pool_that_is_full_is_waited_for(scene: Scene) -> None:
    """More than fits is no fault: it waits, and the other ring has its share."""
    guest, back = scene.guest, scene.back
    queue = guest.queues[0]
    buffer = guest.ram.alloc(MIB)
    guest.ram.view(buffer, MIB)[:] = b"m" * MIB
    ios = [queue.submit(BlkType.OUT, 0, [(buffer, MIB)]) for _ in range(8)]
    queue.kick()
    chains = [back.take(), back.take()]
    serve(back, guest, 1)
    done = 0
    while done < len(ios):
        if not chains:
            chains.append(back.take())
        chain = chains.pop(0)
        assert back.read(chain)[16:] == b"m" * MIB
        back.complete(chain)
        done += 1
    while queue.pending:
        await_reaped(queue)
    assert [io.status for io in ios] == [BlkStatus.OK] * 8
    pool = scene.airlock.session.device.counters()["pool"]
    assert pool["high_water"] <= POOL
    assert pool["used"] == 0
    assert scene.airlock.counters()["stalls"] > 0


@pytest.mark.timing
def test_i6_kicks_without_end_stall_nobody(scene: Scene) -> None:
    ended = threading.Event()

    def storm() -> None:
        while not ended.is_set():
            for queue in scene.guest.queues:
                notify(queue.kick_fd)

    thread = threading.Thread(target=storm, name="storm")
    thread.start()
    try:
        for _ in range(20):
            serve(scene.back, scene.guest)
            serve(scene.back, scene.guest, 1)
            scene.guest.front.barrier()
        scene.airlock.assert_no_message_took_longer(LATE)
    finally:
        ended.set()
        thread.join()


def test_i6_ring_may_be_rewritten_while_it_is_read(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By a guest that never rests. The ring breaks over and over, and nothing else."""
    back = DiskBack(num_queues=2)
    ended = threading.Event()
    with Airlock(back, drain_timeout=0.2) as airlock, small_guest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        bad, good = guest.queues
        area = guest.ram.view(bad.ring_addr, 16 * bad.size)
        table = guest.ram.alloc(4096)
        tables = guest.ram.view(table, 4096)

        def rewrite() -> None:
            chance = random.Random(5)
            addresses = [P, table, LOW_END - 8, HIGH, 1 << 60, bad.ring_addr]
            flags = [0, N, W, T, N | W, N | T, 0xFFFF]
            while not ended.is_set():
                for memory in (area, tables):
                    DESC.pack_into(
                        memory,
                        16 * chance.randrange(bad.size),
                        chance.choice(addresses),
                        chance.choice([0, 1, 16, 64, 4096, 0xFFFFFFFF]),
                        chance.choice(flags),
                        chance.randrange(bad.size + 1),
                    )

        thread = threading.Thread(target=rewrite, name="rewrite")
        thread.start()
        try:
            for _ in range(60):
                ring = bad.driver.ring
                for _ in range(30):
                    slot = ring.avail_idx
                    ring.set_avail_entry(slot & ring.mask, slot % bad.size)
                    ring.avail_idx = (slot + 1) & 0xFFFF
                    notify(bad.kick_fd)
                io = good.submit(BlkType.FLUSH)
                good.kick()
                await_reaped(good)
                assert io.status == BlkStatus.OK
                guest.front.get_vring_base(0)
                drain(bad.err_fd)
                bad.reset()
                guest.front.set_vring_base(0, 0)
                guest.front.set_vring_kick(0, bad.kick_fd)
        finally:
            ended.set()
            thread.join()
        area.release()
        tables.release()
        assert any("ring 0 is broken" in line for line in errors(caplog))
        assert not any("ring 1 is broken" in line for line in errors(caplog))
        guest.stop()
        drain(bad.err_fd)  # the last break may have been told after its ring's stop
        bad.reset()
        guest.start()
        guest.flush()
