# SPDX-License-Identifier: Apache-2.0
"""All orders of the seven messages that make a ring start."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.support.airlock import Airlock
from tests.support.backs import DiskBack
from tests.support.client import SIZE
from tests.traces.guests import Ring
from vhost_airlock.errors import PeerRefused
from vhost_airlock.peers.disk import HEADER, SECTOR, BlkStatus, BlkType
from vhost_airlock.peers.ram import GuestRam
from vhost_airlock.vhost.fds import Fd
from vhost_airlock.vhost.frontend import Frontend
from vhost_airlock.vhost.wire import (
    Feature,
    Payload,
    ProtocolFeature,
    Request,
    VringFd,
    VringState,
)

R = Request
Order = tuple[Request, ...]
OF_A_RING = (
    R.SET_VRING_NUM,
    R.SET_VRING_BASE,
    R.SET_VRING_ADDR,
    R.SET_VRING_CALL,
    R.SET_VRING_KICK,
    R.SET_VRING_ENABLE,
)
RINGS = 24
"""Rings of a session. All have the table at the same place, and each its own order.
With more, each message takes longer; with fewer, there are more sessions."""
FEATURES = Feature.VERSION_1 | Feature.PROTOCOL_FEATURES


def parts(ring: Ring) -> dict[Request, tuple[Payload, list[Fd]]]:
    """The content of the six messages of a ring."""
    index = ring.index
    return {
        R.SET_VRING_NUM: (VringState(index, SIZE), []),
        R.SET_VRING_BASE: (VringState(index, 0), []),
        R.SET_VRING_ADDR: (ring.vring_addr(), []),
        R.SET_VRING_CALL: (VringFd(index), [ring.call]),
        R.SET_VRING_KICK: (VringFd(index), [ring.kick]),
        R.SET_VRING_ENABLE: (VringState(index, 1), []),
    }


class Session:
    """A front-end with many rings, which are set up in one order each."""

    def __init__(self, airlock: Airlock, ram: GuestRam, rings: Sequence[Ring]) -> None:
        self.ram = ram
        self.front = Frontend(airlock.channel())
        for ring in rings:
            ring.reset()
            ring.watched = [self.front]
        self.front.negotiate(ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK)
        self.front.set_owner()
        self.front.set_features(int(FEATURES))
        self.refused: set[Ring] = set()

    def say(self, ring: Ring, requests: Sequence[Request]) -> None:
        """Send messages of a ring, in this order."""
        said = parts(ring)
        for request in requests:
            try:
                self.front.exchange(request, *said[request])
            except PeerRefused:
                self.refused.add(ring)

    def served(self, ring: Ring) -> bool:
        """Is a request of this ring done, and well?"""
        if ring in self.refused:
            return False
        data = ring.index.to_bytes(2, "little") * (SECTOR // 2)
        header = HEADER.pack(BlkType.OUT, 0, ring.index)
        _, (status,) = ring.wait(ring.offer([header, data], [1]))
        return status == bytes([BlkStatus.OK])


@pytest.fixture
def airlock() -> Iterator[Airlock]:
    with Airlock(DiskBack(num_queues=RINGS)) as airlock:
        yield airlock


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    ram = GuestRam()
    yield ram
    ram.close()


@pytest.fixture
def rings(ram: GuestRam) -> Iterator[list[Ring]]:
    rings = [Ring(ram, index) for index in range(RINGS)]
    yield rings
    for ring in rings:
        ring.close()


@pytest.fixture
def begin(
    airlock: Airlock, ram: GuestRam, rings: list[Ring]
) -> Iterator[Callable[[], Session]]:
    """Begins a session, and ends the one before."""
    sessions: list[Session] = []

    def end() -> None:
        while sessions:
            sessions.pop().front.close()
        airlock.join()

    def begin() -> Session:
        end()
        sessions.append(Session(airlock, ram, rings))
        return sessions[-1]

    yield begin
    end()


def some(orders: Iterator[Order]) -> list[Order]:
    """Return the next of them, one for each ring; none at the end."""
    return list(itertools.islice(orders, RINGS))


def test_every_order_starts_a_ring(
    begin: Callable[[], Session], rings: list[Ring]
) -> None:
    """5040 of them; each ring serves a request."""
    failed: list[Order] = []
    for place in range(len(OF_A_RING) + 1):
        orders = itertools.permutations(OF_A_RING)
        while batch := some(orders):
            session = begin()
            for ring, order in zip(rings, batch, strict=True):
                session.say(ring, order[:place])
            session.front.set_mem_table(session.ram.shared())
            for ring, order in zip(rings, batch, strict=True):
                session.say(ring, order[place:])
                if not session.served(ring):
                    failed.append((*order[:place], R.SET_MEM_TABLE, *order[place:]))
    assert not failed, f"{len(failed)} orders, such as {failed[0]}"


def test_ring_that_is_disabled_is_set_up_anew_in_every_order(
    begin: Callable[[], Session], rings: list[Ring]
) -> None:
    """A guest that was reset, with a front-end that only disables the rings."""
    *values, enable = OF_A_RING
    orders = itertools.permutations(values)
    failed: list[Order] = []
    while batch := some(orders):
        session = begin()
        session.front.set_mem_table(session.ram.shared())
        for ring in rings:
            session.say(ring, OF_A_RING)
            assert session.served(ring)
            session.front.set_vring_enable(ring.index, False)
            ring.reset()
        for ring, order in zip(rings, batch, strict=True):
            session.say(ring, (*order, enable))
            if not session.served(ring):
                failed.append(order)
    assert not failed, f"{len(failed)} orders, such as {failed[0]}"
