# SPDX-License-Identifier: Apache-2.0
"""Many queues, of which some come late, some never work, and some never come."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.airlock import Airlock
from tests.support.backs import DiskBack, ScriptedBack
from tests.support.sessions import await_reaped
from tests.support.vmm import Qemu
from vhost_airlock.peers.disk import BlkType
from vhost_airlock.peers.guest_queue import GuestQueue
from vhost_airlock.vhost.fds import drain
from vhost_airlock.vhost.wire import U64, Feature, Request

QUEUES = 5
MRG_RXBUF = 1 << 15


@pytest.fixture(params=[1, 3])
def airlock(request: pytest.FixtureRequest) -> Iterator[Airlock]:
    """With so many workers."""
    with Airlock(DiskBack(num_queues=QUEUES), workers=request.param) as airlock:
        yield airlock


class Vmm(Qemu):
    """It has not said anything about its rings yet."""

    device_queues = QUEUES

    def start(self) -> None:
        self.acks = True
        self.say(Request.SET_FEATURES, U64(self.use(self.offered)))
        self._share_memory()


@pytest.fixture
def vmm(airlock: Airlock) -> Iterator[Vmm]:
    with Vmm(num_queues=QUEUES) as vmm:
        vmm.open(airlock.channel())
        yield vmm


def set_up(vmm: Vmm, index: int) -> None:
    vmm.set_num(index)
    vmm.set_base(index)
    vmm.set_addr(index)
    vmm.set_call(index)
    vmm.set_kick(index)


def flush(queue: GuestQueue) -> None:
    io = queue.submit(BlkType.FLUSH)
    queue.kick()
    await_reaped(queue)
    io.check()


def test_queues_are_enabled_one_by_one(vmm: Vmm) -> None:
    """Each serves from then on, and none before."""
    ios = []
    for queue in vmm.queues:
        set_up(vmm, queue.index)
        ios.append(queue.submit(BlkType.FLUSH))
        queue.kick()
    for queue in vmm.queues:
        vmm.enable(queue.index, True)
        await_reaped(queue)
        ios[queue.index].check()
        later = vmm.queues[queue.index + 1 :]
        assert [other.reap() for other in later] == [[]] * len(later)
    vmm.work()


def test_queues_are_disabled_one_by_one(vmm: Vmm) -> None:
    """In any order, while the others go on."""
    for queue in vmm.queues:
        set_up(vmm, queue.index)
        vmm.enable(queue.index, True)
    vmm.work()
    left = [vmm.queues[index] for index in (2, 0, 4, 1, 3)]
    while left:
        queue = left.pop()
        vmm.enable(queue.index, False)
        waits = queue.submit(BlkType.FLUSH)
        queue.kick()
        for other in left:
            flush(other)
        assert not queue.reap()
        vmm.get_base(queue.index)
        assert waits.status is None
    assert [queue.base for queue in vmm.queues] == [
        queue.driver.next_avail - 1 for queue in vmm.queues
    ]


def test_some_queues_never_work(vmm: Vmm, airlock: Airlock) -> None:
    """One is never kicked, one has no kick descriptor, and one was never set up."""
    works, never_kicked, never_started, never_set_up, works_too = vmm.queues
    for queue in (works, never_kicked, works_too):
        set_up(vmm, queue.index)
    drain(never_kicked.kick_fd)
    vmm.set_num(never_started.index)
    vmm.set_addr(never_started.index)
    vmm.set_call(never_started.index)
    for queue in vmm.queues:
        vmm.enable(queue.index, True)
    for _ in range(3):
        for queue in (works, works_too):
            flush(queue)
    for queue in vmm.queues:
        vmm.enable(queue.index, False)
        vmm.get_base(queue.index)
    done = works.driver.next_avail
    assert [queue.base for queue in vmm.queues] == [
        done,
        never_kicked.driver.next_avail,
        never_started.base,
        never_set_up.base,
        done,
    ]
    back = airlock.back
    started = {seen.payload.index for seen in back.got(Request.SET_VRING_KICK)}
    assert started == {works.index, never_kicked.index, works_too.index}


@pytest.mark.parametrize(("feature", "calls"), [(MRG_RXBUF, 1), (0, 4)])
def test_the_chains_of_a_packet_are_seen_at_once(feature: int, calls: int) -> None:
    """A guest that asks for it is called once, when all that belongs together is
    there; another guest, which can go on with a part, as soon as there is a part."""
    wanted = (Vmm.wanted_features | feature) & ~Feature.EVENT_IDX
    back = ScriptedBack(features=wanted | Feature.PROTOCOL_FEATURES)
    with Airlock(back) as airlock, Vmm(num_queues=1) as vmm:
        vmm.wanted_features = wanted
        vmm.open(airlock.channel())
        set_up(vmm, 0)
        vmm.enable(0, True)
        (queue,) = vmm.queues
        for _ in range(16):
            queue.submit(BlkType.FLUSH)
        queue.kick()
        for _ in range(16):
            back.ring().complete(back.take().head, 1)
        before = airlock.counters()["calls"]
        back.publish()
        vmm.get_base(0)
        assert len(queue.reap()) == 16
        assert airlock.counters()["calls"] - before == calls
