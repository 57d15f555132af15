# SPDX-License-Identifier: Apache-2.0
"""Chains over which backs are lost: who is suspected, and how the guilty one ends."""

from __future__ import annotations

import threading

import pytest

from tests.support.backs import readable, wait_until
from tests.support.plane import PAGE, Lane, Record, World
from vhost_airlock.dataplane.worker import Worker
from vhost_airlock.peers import Chain
from vhost_airlock.vhost.fds import eventfd

SECTOR = 512


@pytest.fixture
def world():
    world = World()
    yield world
    world.check()


def offer(lane, number, *, data=SECTOR):
    """A chain with its number to read, some bytes to write, and a status."""
    lane.world.ram.write(PAGE * number, b"%8d" % number)
    lane.world.ram.write(PAGE * (8 + number), b"\xee" * SECTOR)
    room = [(PAGE * (8 + number), data, True)] if data else []
    return lane.offer((PAGE * number, 8), *room, (PAGE * (16 + number), 1, True))


def status(world, number):
    return world.ram.read(PAGE * (16 + number), 1)


def take_all(lane) -> list[Chain]:
    return list(iter(lane.device.take, None))


def numbers(lane, chains) -> list[int]:
    return [int(lane.bytes_of(chain)) for chain in chains]


def lose(lane, *, alone=False):
    """The back is gone; the next one gets one chain at a time if `alone`. Returns the
    heads that were condemned.
    """
    condemned = lane.pump.accuse()
    base, *_ = lane.stop(None)
    lane.world.lose_back()
    lane.pump.set_alone(alone)
    lane.start(base)
    lane.step()
    return condemned


@pytest.fixture(params=[False, True], ids=["", "recorded"])
def lane(world, request):
    record = Record(16) if request.param else None
    return Lane(world, has_error=True, record=record)


def test_a_chain_that_kills_alone_ends_with_an_error(world, lane):
    """The others go on. It is taken from the guest's ring, or by its head."""
    heads = [offer(lane, number) for number in range(4)]
    lane.step()
    for alone in (False, True):
        assert lose(lane, alone=alone) == []
        assert lane.pump.suspected == (4 if alone else 0)
    (only,) = take_all(lane)
    assert numbers(lane, [only]) == [0]
    lane.complete(only, b"\1" * SECTOR + b"\0")
    lane.step()
    (guilty,) = take_all(lane)
    assert numbers(lane, [guilty]) == [1]
    assert lose(lane, alone=True) == [heads[1]]
    rest = take_all(lane)
    assert numbers(lane, rest) == [2]
    assert [head for head, _ in lane.used()] == heads[:2]
    assert (status(world, 0), status(world, 1)) == (b"\0", b"\1")
    assert world.ram.read(PAGE * 9, SECTOR) == b"\xee" * SECTOR
    lane.complete(rest[0], bytes(SECTOR + 1))
    lane.step()
    lane.complete(lane.take(), bytes(SECTOR + 1))
    lane.step()
    assert [head for head, _ in lane.used()] == heads[2:]
    assert lane.pump.suspected == 0
    assert (lane.counter("poisoned"), lane.counter("completions")) == (1, 4)
    if lane.record is not None:
        assert lane.record.marked == []


def test_one_in_the_middle_ends_from_its_slot(world, lane):
    """Chains behind it are done, so the guest does not offer it again."""
    heads = [offer(lane, number) for number in range(3)]
    lane.step()
    lane.complete(take_all(lane)[2], bytes(SECTOR + 1))
    lane.step()
    lose(lane)
    lose(lane, alone=True)
    assert numbers(lane, take_all(lane)) == [0]
    assert lose(lane, alone=True) == [heads[0]]
    assert [head for head, _ in lane.used()] == [heads[2], heads[0]]
    assert status(world, 0) == b"\1"
    assert lane.counter("poisoned") == 1
    (left,) = take_all(lane)
    lane.complete(left, bytes(SECTOR + 1))
    lane.step()
    assert [head for head, _ in lane.used()] == [heads[1]]
    assert world.pool.used == 0
    lane.stop(None)
    assert lane.pump.lose_back() == 0, "none is left to offer again"


def test_length_says_what_was_written(world, lane):
    """Of a request whose only byte to write is the status: one. Else none, since the
    bytes before the status are as they were.
    """
    offer(lane, 0, data=0)
    offer(lane, 1)
    lane.step()
    for alone in (False, True, True, True):
        lose(lane, alone=alone)
    assert [length for _, length in lane.used()] == [1, 0]


def test_a_packet_is_dropped(world, lane):
    """It has nothing to write."""
    head = lane.offer((0, 100))
    lane.step()
    for alone in (False, True, True):
        lose(lane, alone=alone)
    assert lane.used() == [(head, 0)]


def test_without_an_error_the_ring_breaks(world):
    lane = Lane(world)
    first, head = offer(lane, 0), offer(lane, 1)
    lane.step()
    lose(lane)
    lose(lane, alone=True)
    lane.complete(lane.take(), bytes(SECTOR + 1))
    lane.step()
    assert lose(lane, alone=True) == [head]
    assert lane.pump.reason == (
        f"the back-end is lost each time that it gets a chain: head {head}, 3 losses"
    )
    assert lane.pump.drains
    assert lane.device.take() is None
    assert [used for used, _ in lane.used()] == [first]
    base, *_ = lane.stop(0)
    lane.start(base)
    lane.step()
    assert lane.pump.fault, "the ring goes on at the same chain"


def test_with_others_none_is_condemned(world, lane):
    for number in range(2):
        offer(lane, number)
    lane.step()
    for _ in range(6):
        assert lose(lane) == []
    assert lane.pump.suspected == 2
    assert len(take_all(lane)) == 2


def test_alone_in_its_ring_is_not_alone(world, lane):
    """Nor is one of two that the ring has, whatever it was to have."""
    offer(lane, 0)
    lane.step()
    for alone in (False, True):
        assert lose(lane, alone=alone) == []
    assert lane.pump.at_back == 1
    assert lane.pump.accuse(others=True) == []
    lane.pump.set_alone(False)
    offer(lane, 1)
    lane.step()
    lane.pump.set_alone(True)
    assert lane.pump.at_back == 2
    assert lane.pump.accuse() == []
    lane.complete(take_all(lane)[1], bytes(SECTOR + 1))
    lane.step()
    assert lane.pump.at_back == 1
    assert len(lane.pump.accuse()) == 1


def test_none_is_condemned_that_had_no_turn(world, lane):
    """It was alone by chance: nobody has kept the other rings from theirs."""
    offer(lane, 0)
    lane.step()
    for _ in range(5):
        assert lose(lane) == []
    assert lane.pump.suspected == 1


def test_others_that_are_done_leave_the_accused_one(world, lane):
    guilty = offer(lane, 0)
    lane.step()
    for _ in range(2):
        lose(lane)
    other = offer(lane, 1)
    lane.step()
    lane.complete(take_all(lane)[1], bytes(SECTOR + 1))
    lane.step()
    lane.pump.set_alone(True)
    assert lose(lane, alone=True) == [guilty]
    assert lane.device.take() is None
    assert [head for head, _ in lane.used()] == [other, guilty]
    assert status(world, 0) == b"\1"


def test_chains_that_a_stop_has_left_are_accused(world, lane):
    """The guest has not offered them again yet."""
    offer(lane, 0)
    lane.step()
    lane.take()
    base, *_ = lane.stop(1)
    lane.start(base)
    assert lane.pump.at_back == 1
    for _ in range(2):
        lane.pump.accuse()
    assert lane.pump.suspected == 1


def test_control_plane_is_told_when_the_last_suspect_is_done(world, lane):
    """And not before: another one is next then."""
    for number in range(2):
        offer(lane, number)
    lane.step()
    lose(lane)
    lose(lane, alone=True)
    taken = take_all(lane)
    lane.complete(taken[0], bytes(SECTOR + 1))
    with eventfd() as events:
        worker = Worker(events.fileno())
        worker.add(lane.pump)
        thread = threading.Thread(target=worker.run)
        thread.start()

        def second() -> bool:
            taken.extend(take_all(lane))
            return len(taken) == 2

        try:
            wait_until(second, "the second one is offered")
            with worker.pause():
                assert not readable(events, 0)
                lane.complete(taken[1], bytes(SECTOR + 1))
            assert readable(events)
        finally:
            worker.stop()
            thread.join()
            worker.close()


def test_done_chains_are_acquitted(world, lane):
    """Their heads stand for other chains then."""
    for _ in range(5):
        offer(lane, 0)
        lane.step()
        lose(lane, alone=True)
        lane.complete(lane.take(), bytes(SECTOR + 1))
        lane.step()
        assert len(lane.used()) == 1
        assert lane.pump.suspected == 0
    offer(lane, 0)
    lane.step()
    assert lose(lane, alone=True) == lose(lane, alone=True) == []


def test_a_completion_of_the_last_moment_acquits(world, lane):
    offer(lane, 0)
    lane.step()
    lose(lane)
    lane.complete(lane.take(), bytes(SECTOR + 1))
    lane.pump.set_taking(False)
    lane.step()
    lose(lane)
    assert lane.pump.suspected == 0


def test_buffers_for_packets_are_never_accused(world, lane):
    for page in range(4):
        lane.offer((PAGE * page, PAGE, True))
    lane.step()
    for _ in range(5):
        lose(lane, alone=True)
        assert len(take_all(lane)) == 4
    assert lane.pump.suspected == 0


def test_a_ring_that_was_reset_has_no_suspects(world, lane):
    offer(lane, 0)
    lane.step()
    lane.complete(lane.take(), bytes(SECTOR + 1))
    lane.step()
    offer(lane, 1)
    lane.step()
    for alone in (False, True):
        lose(lane, alone=alone)
    assert lane.pump.suspected == 1
    lane.stop(0)
    lane.reset()
    lane.start(0)
    assert lane.pump.suspected == 0


def test_a_smaller_ring_has_no_suspects_behind_its_end(world):
    lane = Lane(world, size=16)
    for number in range(9):
        lane.offer((PAGE * number, 8))
    lane.step()
    lose(lane)
    lose(lane, alone=True)
    assert lane.pump.suspected == 9
    lane.stop(0)
    lane.reset(0, 8)
    lane.start(0)
    assert lane.pump.suspected == 8


def test_all_go_on_together_when_the_suspects_are_done(world, lane):
    for number in range(2):
        offer(lane, number)
    lane.step()
    lose(lane)
    lose(lane, alone=True)
    for number in range(2, 5):
        offer(lane, number)
    for _ in range(2):
        (chain,) = take_all(lane)
        lane.complete(chain, bytes(SECTOR + 1))
        lane.step()
    assert numbers(lane, take_all(lane)) == [2, 3, 4]
