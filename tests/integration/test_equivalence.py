# SPDX-License-Identifier: Apache-2.0
"""I3, I4: through the airlock is as direct, whatever the back can and can't do."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection
from functools import cache

import pytest

from tests.support.airlock import Airlock, Direct
from tests.support.backs import DiskBack
from tests.support.traffic import SECTORS, Plan, Traffic
from vhost_airlock.peers.disk import SECTOR, BlkStatus, BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.vhost.wire import Feature, ProtocolFeature

Features = tuple[Feature | ProtocolFeature, ...]
World = type[Airlock] | type[Direct]

OPTIONAL: Features = (
    Feature.EVENT_IDX,
    Feature.INDIRECT_DESC,
    ProtocolFeature.CONFIGURE_MEM_SLOTS,
    ProtocolFeature.REPLY_ACK,
)
COMBINATIONS: list[Features] = [
    combination
    for count in range(len(OPTIONAL) + 1)
    for combination in itertools.combinations(OPTIONAL, count)
]


def names(features: object) -> str:
    assert isinstance(features, tuple)
    return "-".join(str(feature.name) for feature in features) or "all"


def carry_out(
    world: World,
    plan: Plan,
    *,
    back_without: Features = (),
    front_without: Collection[Feature | ProtocolFeature] = (),
    restarts: bool = False,
    **options: object,
) -> tuple[list[object], bytes]:
    """The results of the plan, and the bytes on the disk."""
    back = DiskBack(sectors=SECTORS, num_queues=2, without=back_without)
    chance = random.Random(7)

    def between(round: int) -> None:
        """With requests in flight: stop and go on, in one way or another."""
        if not restarts:
            return
        match round % 3:
            case 0:
                guest.stop()
                guest.start()
            case 1:
                queue = guest.queues[chance.randrange(2)]
                if guest.features & Feature.PROTOCOL_FEATURES:
                    guest.front.set_vring_enable(queue.index, False)
                    guest.front.set_vring_enable(queue.index, True)
                    queue.kick()
            case 2:
                guest.disconnect()
                if isinstance(between_worlds, Airlock):
                    between_worlds.join()
                back.join()
                guest.reconnect(between_worlds.channel())

    with world(back, **options) as between_worlds:
        with BlkGuest(
            num_queues=2, queue_size=32, seg_max=14, without=front_without
        ) as guest:
            guest.connect(between_worlds.channel())
            guest.start()
            traffic = Traffic(guest, plan)
            traffic.run(between)
            guest.stop()
            assert all(queue.pending == 0 for queue in guest.queues)
            assert not any(list(queue.driver.used()) for queue in guest.queues)
            content = back.content(SECTORS * SECTOR)
        assert content == traffic.disk
        return traffic.results, content


@cache
def direct(seed: int) -> tuple[list[object], bytes]:
    return carry_out(Direct, Plan.make(seed))


@pytest.mark.parametrize("without", COMBINATIONS, ids=names)
def test_i4_same_as_direct_with_any_features_of_the_back(without: Features) -> None:
    plan = Plan.make(1)
    assert carry_out(Airlock, plan, back_without=without) == direct(1)


@pytest.mark.parametrize("without", COMBINATIONS[1:], ids=names)
def test_i4_same_as_direct_with_any_features_of_the_front(without: Features) -> None:
    plan = Plan.make(2)
    assert carry_out(Airlock, plan, front_without=without) == direct(2)


@pytest.mark.parametrize("without", COMBINATIONS, ids=names)
def test_i3_nothing_is_lost_or_doubled_by_stops(without: Features) -> None:
    """Stops and starts, disabled rings and new connections, with requests in flight."""
    plan = Plan.make(3)
    assert carry_out(Airlock, plan, back_without=without, restarts=True) == direct(3)


@pytest.mark.parametrize("seed", range(10, 16))
def test_i4_same_as_direct_with_other_plans(seed: int) -> None:
    """And with features that differ on the two sides."""
    chance = random.Random(seed)
    assert carry_out(
        Airlock,
        Plan.make(seed),
        back_without=chance.choice(COMBINATIONS),
        front_without=chance.choice(COMBINATIONS),
        restarts=True,
        copy=chance.choice(["full", "used+tail"]),
        poll_us=chance.choice([0, 50, 1000]),
        workers=chance.choice([1, 2]),
        pool_limit=chance.choice([128 << 10, 1 << 20, 256 << 20]),
    ) == direct(seed)


def test_direct_plan_with_restarts_is_the_same_too() -> None:
    """The yardstick is straight."""
    assert carry_out(Direct, Plan.make(3), restarts=True) == direct(3)


@pytest.mark.parametrize("size", [1, 4])
def test_i3_tiny_rings_wrap_round(size: int) -> None:
    """More than 65536 requests, as many at a time as the ring holds."""
    back = DiskBack(num_queues=1)
    with Airlock(back) as airlock, BlkGuest(queue_size=size, seg_max=2) as guest:
        guest.connect(airlock.channel())
        guest.start()
        (queue,) = guest.queues
        done = 0
        while done < 0x10000 + 100:
            for _ in range(size):
                queue.submit(99, indirect=True)
            guest.finish()
            done += size
        guest.stop()
        assert queue.base == done & 0xFFFF
        guest.start()
        assert guest.do(BlkType.FLUSH).status == BlkStatus.OK
        assert airlock.counters()["completions"] == done + 1
