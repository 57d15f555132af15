# SPDX-License-Identifier: Apache-2.0
"""Messages in every order that front-ends are known for, and in some that they aren't.

In any order, requests are served, and the back gets its messages in the one order
that all back-ends take.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.airlock import Airlock
from tests.support.backs import DiskBack, readable, wait_until
from tests.support.order import check_order
from tests.support.sessions import await_reaped
from tests.support.vmm import VMMS, Blkio, CloudHypervisor, Crosvm, Qemu, Vmm
from vhost_airlock.peers.disk import BlkType
from vhost_airlock.peers.ring import SplitLayout, SplitRing
from vhost_airlock.vhost.fds import drain, eventfd
from vhost_airlock.vhost.wire import (
    Feature,
    ProtocolFeature,
    Request,
)


@pytest.fixture
def back() -> DiskBack:
    return DiskBack(num_queues=4)


@pytest.fixture
def airlock(back: DiskBack) -> Iterator[Airlock]:
    """At the end, the back has been spoken to in order."""
    with Airlock(back) as airlock:
        yield airlock
        airlock.end()
        back.join()
        assert back.errors == []
        check_order(back.seen)


@pytest.fixture
def serve(airlock: Airlock) -> Iterator[Callable[[type[Vmm]], Vmm]]:
    """Makes a VMM of a kind, which has come as far as its driver."""
    made: list[Vmm] = []

    def serve(kind: type[Vmm]) -> Vmm:
        made.append(kind())
        made[-1].open(airlock.channel())
        return made[-1]

    yield serve
    for vmm in made:
        vmm.close()


Serve = Callable[[type[Vmm]], Vmm]


@pytest.mark.parametrize("kind", VMMS)
def test_vmm_is_served(serve: Serve, kind: type[Vmm]) -> None:
    vmm = serve(kind)
    for _ in range(3):
        vmm.work()
    vmm.stop()


@pytest.mark.parametrize("kind", [kind for kind in VMMS if kind is not Blkio])
def test_vmm_may_stop_and_go_on(serve: Serve, kind: type[Vmm]) -> None:
    """With the base that it got, as for a paused guest."""
    vmm = serve(kind)
    for round in range(1, 4):
        vmm.work()
        vmm.stop()
        assert [queue.base for queue in vmm.queues] == [2 * round] * 2
        vmm.start()
    vmm.work()


@pytest.mark.parametrize("kind", [kind for kind in VMMS if kind is not Blkio])
def test_vmm_may_stop_and_begin_anew(serve: Serve, kind: type[Vmm]) -> None:
    """With base 0 and an empty ring, as for a guest that is reset."""
    vmm = serve(kind)
    for _ in range(3):
        vmm.work()
        vmm.stop()
        for queue in vmm.queues:
            queue.reset()
        vmm.start()
    vmm.work()


def test_masked_interrupts_are_kept_for_later(serve: Serve) -> None:
    vmm = serve(Qemu)
    assert isinstance(vmm, Qemu)
    (queue, _), masked = vmm.queues, vmm.spare[0]
    vmm.work()
    for _ in range(5):
        drain(masked)
        vmm.mask(True)
        drain(queue.call_fd)
        queue.driver.arm()
        io = queue.submit(BlkType.FLUSH)
        queue.kick()
        drain(masked)  # a call that came at once for what may have been missed
        while not queue.reap():
            assert readable(masked)
            drain(masked)
        io.check()
        assert not drain(queue.call_fd)
        vmm.mask(False)
        vmm.work()


def test_call_may_change_at_any_time_under_load(serve: Serve) -> None:
    """Every completion is signalled on the old descriptor or on the new one."""
    vmm = serve(Qemu)
    (queue, _) = vmm.queues
    other = vmm.spare[0]
    for turn in range(300):
        io = queue.submit(BlkType.FLUSH)
        queue.driver.arm()
        queue.kick()
        vmm.front.set_vring_call(0, other if turn % 2 else queue.call_fd)
        current, old = (other, queue.call_fd) if turn % 2 else (queue.call_fd, other)
        while not queue.reap():
            # A call on the old one before the change is repeated on the new one.
            assert readable(current)
            drain(current)
        drain(old)
        io.check()


def test_new_call_is_signalled_for_what_may_have_been_missed(serve: Serve) -> None:
    """A completion was signalled on the old one, where nobody listens any more."""
    vmm = serve(Qemu)
    queue, other = vmm.queues[0], vmm.spare[0]
    for _ in range(5):
        drain(other)
        vmm.front.set_vring_call(0, other)
        assert readable(other)
        drain(other)
        queue.submit(BlkType.FLUSH)
        queue.driver.arm()
        queue.kick()
        assert readable(other)
        drain(queue.call_fd)
        vmm.front.set_vring_call(0, queue.call_fd)
        assert readable(queue.call_fd)
        assert queue.reap()


def test_enable_without_acks_is_followed_by_a_barrier(
    airlock: Airlock, back: DiskBack
) -> None:
    """Or the front would be told that something is done which is not."""
    back.without = [ProtocolFeature.REPLY_ACK]
    with CloudHypervisor() as vmm:
        vmm.open(airlock.channel())
        vmm.work()
        vmm.stop()
    order = back.requests()
    enables = [i for i, each in enumerate(order) if each == Request.SET_VRING_ENABLE]
    assert len(enables) == 4, "each once by its message, and at the end"
    assert all(order[i + 1] == Request.GET_FEATURES for i in enables)


def test_vmm_that_polls_is_not_called(serve: Serve) -> None:
    """A call without a descriptor: it looks at the ring by itself."""
    vmm = serve(Qemu)
    queue = vmm.queues[0]
    vmm.front.set_vring_call(0, None)
    drain(queue.call_fd)
    for _ in range(5):
        io = queue.submit(BlkType.FLUSH)
        queue.driver.arm()
        queue.kick()
        wait_until(lambda: bool(queue.reap()), "it is done")
        io.check()
    assert not drain(queue.call_fd)
    vmm.set_call(0)
    vmm.work()


def test_session_that_is_idle_costs_nothing(serve: Serve) -> None:
    """Polling ends soon after the last request."""
    vmm = serve(Qemu)
    vmm.work()
    threading.Event().wait(0.1)
    before = time.process_time()
    threading.Event().wait(0.5)
    assert time.process_time() - before < 0.1


def test_kick_may_be_sent_again_while_the_ring_runs(serve: Serve) -> None:
    vmm = serve(Qemu)
    (queue, _) = vmm.queues
    with eventfd() as second:
        first, queue.kick_fd = queue.kick_fd, second
        vmm.set_kick(0)
        for _ in range(3):
            vmm.work()
        queue.kick_fd = first
    for _ in range(3):
        vmm.set_kick(0)
        vmm.set_kick(0)
        vmm.work()


def test_address_may_be_sent_again_while_the_ring_runs(
    serve: Serve, back: DiskBack
) -> None:
    """QEMU does that to switch logging on and off."""
    vmm = serve(Qemu)
    for _ in range(5):
        vmm.set_addr(0)
        vmm.front.barrier()
        vmm.work()
    assert len(back.got(Request.SET_VRING_ADDR)) == 2


def move(vmm: Vmm) -> memoryview:
    """Copy the first ring to another place and use it there; returns the old one."""
    queue, layout = vmm.queues[0], SplitLayout(vmm.queues[0].size)
    old = vmm.ram.view(queue.ring_addr, layout.end)
    queue.ring_addr = vmm.ram.alloc(layout.end)
    new = vmm.ram.view(queue.ring_addr, layout.end)
    new[:] = old
    queue.driver.ring.release()
    queue.driver.ring = queue._ring = SplitRing.at(new, layout)
    return old


def test_ring_may_move_while_it_runs(serve: Serve) -> None:
    """Its content goes with it; the old place is not used any more."""
    vmm = serve(CloudHypervisor)
    for _ in range(3):
        vmm.work()
        old = move(vmm)
        vmm.set_addr(0)
        before = bytes(old)
        vmm.work()
        assert old == before
        old.release()


def test_ring_may_be_enabled_before_it_is_set_up(serve: Serve) -> None:
    """As virtio-net's do when its state is restored."""
    vmm = serve(Qemu)
    vmm.stop()
    for queue in vmm.queues:
        vmm.front.set_vring_enable(queue.index, True)
    vmm.acks = True
    for queue in vmm.queues:
        vmm.set_num(queue.index)
        vmm.set_base(queue.index)
        vmm.set_addr(queue.index)
        vmm.set_call(queue.index)
        vmm.set_kick(queue.index)
    vmm.work()


def test_ring_that_is_not_enabled_is_not_served(serve: Serve) -> None:
    vmm = serve(CloudHypervisor)
    vmm.work()
    assert isinstance(vmm, CloudHypervisor)
    vmm.pause()
    ios = [queue.submit(BlkType.FLUSH) for queue in vmm.queues]
    for queue in vmm.queues:
        queue.driver.publish()
    vmm.enable(1, True)
    vmm.queues[1].kick()
    await_reaped(vmm.queues[1])
    ios[1].check()
    # The other one had its kick long before.
    assert not vmm.queues[0].reap()
    vmm.pause(False)
    vmm.finish()
    ios[0].check()
    vmm.work()


def test_base_of_a_ring_that_never_started(serve: Serve, back: DiskBack) -> None:
    vmm = serve(Qemu)
    front = vmm.front
    assert front.get_vring_base(3) == 0
    front.set_vring_num(3, 64)
    front.set_vring_base(3, 1234)
    assert front.get_vring_base(3) == 1234
    assert front.get_vring_base(255) == 0
    assert not back.got(Request.GET_VRING_BASE)
    vmm.work()


def test_ring_may_be_stopped_twice(
    serve: Serve, back: DiskBack, airlock: Airlock
) -> None:
    """With the first time, the guest's kicks are of no interest any more."""
    vmm = serve(Qemu)
    vmm.work()
    assert vmm.front.get_vring_base(0) == 2
    assert airlock.session.device.rings[0].front.kick is None
    assert vmm.front.get_vring_base(0) == 2
    assert len(back.got(Request.GET_VRING_BASE)) == 1


STEPS: dict[str, Callable[[Vmm], None]] = {
    "memory": lambda vmm: vmm.set_table(),
    "num": lambda vmm: vmm.set_num(0),
    "base": lambda vmm: vmm.set_base(0),
    "addr": lambda vmm: vmm.set_addr(0),
    "call": lambda vmm: vmm.set_call(0),
    "kick": lambda vmm: vmm.set_kick(0),
    "enable": lambda vmm: vmm.enable(0, True),
}


class Anyhow(Vmm):
    """Says what a start takes in the order that it is told."""

    def __init__(self) -> None:
        super().__init__(num_queues=1)

    def open(self, channel: object) -> None:
        front = self.attach(channel)  # type: ignore[arg-type]
        offered = front.get_features()
        front.negotiate(self.wanted_protocol)
        front.set_owner()
        front.set_features(self.use(offered))


def orders() -> list[tuple[str, ...]]:
    """Many of the 5040 orders. Size and base are only for rings that are stopped."""
    possible = [
        order
        for order in itertools.permutations(STEPS)
        if order.index("num") < order.index("kick") > order.index("base")
    ]
    return random.Random(1).sample(possible, 100)


def test_parts_of_a_start_may_come_in_any_order(serve: Serve, back: DiskBack) -> None:
    vmm = serve(Anyhow)
    for order in orders():
        for step in order:
            STEPS[step](vmm)
        vmm.work()
        vmm.stop()
        vmm.front.set_mem_table([])
    assert len(back.got(Request.SET_VRING_KICK)) == 100


def test_without_the_bit_for_protocol_features_a_kick_enables(serve: Serve) -> None:
    class Old(Anyhow):
        wanted_features = Vmm.wanted_features & ~Feature.PROTOCOL_FEATURES
        acks = False

        def open(self, channel: object) -> None:
            front = self.attach(channel)  # type: ignore[arg-type]
            front.set_owner()
            front.set_features(self.use(front.get_features()))

    vmm = serve(Old)
    for step in ("memory", "num", "base", "addr", "call", "kick"):
        STEPS[step](vmm)
    vmm.work()
    vmm.get_base(0)
    STEPS["num"](vmm)
    STEPS["kick"](vmm)
    vmm.work()


def test_features_may_change_between_starts(serve: Serve, back: DiskBack) -> None:
    """As when a guest reboots into another driver."""
    vmm = serve(CloudHypervisor)
    assert isinstance(vmm, CloudHypervisor)
    for wanted in (
        Vmm.wanted_features & ~Feature.EVENT_IDX,
        Vmm.wanted_features & ~Feature.INDIRECT_DESC,
        int(Feature.VERSION_1 | Feature.PROTOCOL_FEATURES),
        Vmm.wanted_features,
    ):
        vmm.work()
        vmm.stop()
        vmm.wanted_features = wanted
        vmm.use(vmm.offered)
        for queue in vmm.queues:
            queue.reset()
        vmm.start()
    vmm.work()
    assert back.requests().count(Request.SET_FEATURES) <= 4


def test_features_may_be_repeated_while_rings_run(serve: Serve, back: DiskBack) -> None:
    vmm = serve(Qemu)
    vmm.work()
    for _ in range(3):
        vmm.front.set_features(vmm.features)
        vmm.work()
    assert len(back.got(Request.SET_FEATURES)) == 1


def test_memory_may_come_last(serve: Serve) -> None:
    vmm = serve(Anyhow)
    for step in ("num", "base", "addr", "call", "kick", "enable"):
        STEPS[step](vmm)
    io = vmm.queues[0].submit(BlkType.FLUSH)
    vmm.queues[0].kick()
    front = vmm.front
    for region, fd in reversed(vmm.ram.shared()):
        front.add_mem_region(region, fd)
    vmm.finish()
    io.check()


def test_buffers_may_be_announced_at_any_time(serve: Serve) -> None:
    vmm = serve(Blkio)
    assert isinstance(vmm, Blkio)
    for _ in range(10):
        region = vmm.add_buffer()
        buffer = vmm.ram.alloc(4096, 512, region=region)
        vmm.ram.view(buffer, 4096)[:] = b"b" * 4096
        vmm.write(8, [(buffer, 4096)])
        vmm.ram.view(buffer, 4096)[:] = bytes(4096)
        vmm.read(8, [(buffer, 4096)])
        assert vmm.ram.view(buffer, 4096) == b"b" * 4096


def test_front_ends_follow_each_other(airlock: Airlock, back: DiskBack) -> None:
    """Of every kind, some of which leave in the middle of things."""
    for kind in (*VMMS, Crosvm, *VMMS):
        vmm = kind()
        vmm.open(airlock.channel())
        vmm.work()
        vmm.queues[0].submit(BlkType.FLUSH)
        vmm.queues[0].kick()
        vmm.close()
        airlock.join()
        back.join()
        check_order(back.seen)
        back.forget_seen()
