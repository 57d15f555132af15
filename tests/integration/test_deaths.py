# SPDX-License-Identifier: Apache-2.0
"""A back-end dies at any point under load, and the next one goes on.

It journals its executions and completes them out of order. A request that the guest saw
completed ran at least once, and never runs again, so it can't undo a later one; none is
reported twice. The load checks that as it goes, see tests/support/journal.py.
"""

from __future__ import annotations

import os
import socket
from enum import Enum, auto

import pytest

from tests.support.airlock import Airlock
from tests.support.backs import ScriptedBack, wait_until
from tests.support.journal import SIZE, Load
from tests.support.profiles import STRESS
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.proxy import recovery
from vhost_airlock.proxy.state import State
from vhost_airlock.vhost.wire import ProtocolFeature

DEATHS = 10_000 if STRESS else 60
FEW = 3
"""Requests that are done between two deaths in a row, at the most."""
MANY = 40


class Death(Enum):
    """How far it comes with its last request."""

    BEFORE = auto()
    """It takes it."""
    EXECUTED = auto()
    """It has executed it, and the airlock can't know."""
    WRITTEN = auto()
    """The used element is there, and the used index is not."""
    PUBLISHED = auto()
    """The used index is there, and the airlock was not called."""
    CALLED = auto()


def die(load: Load, death: Death) -> None:
    """Take what is there, and die over one of the requests."""
    back = load.back
    for queue in load.guest.queues:
        load.at_back += [(queue.index, each) for each in back.take_all(queue.index)]
    load.random.shuffle(load.at_back)
    if load.at_back and death is not Death.BEFORE:
        index, chain = load.at_back.pop()
        if death is Death.EXECUTED:
            load.work(index, chain)
        elif death is Death.WRITTEN:
            load.work(index, chain)
            back.ring(index).complete(chain.head, 1)
        else:
            call = back.vrings[index].call
            if death is Death.PUBLISHED:
                back.vrings[index].call = None
            load.execute_one(index, chain)
            back.vrings[index].call = call
    load.at_back.clear()
    assert back.channel is not None
    with socket.socket(fileno=os.dup(back.channel.fileno())) as its:
        its.shutdown(socket.SHUT_RDWR)


def all_run(airlock: Airlock) -> bool:
    rings = airlock.session.device.rings.values()
    return all(ring.state is State.RUNNING for ring in rings)


def await_next(airlock: Airlock, back: ScriptedBack, deaths: int) -> None:
    wait_until(lambda: back.connections == deaths + 1, "the next one comes")
    wait_until(lambda: all_run(airlock), "all rings run")


def suspected(airlock: Airlock) -> int:
    return sum(ring.suspected for ring in airlock.session.device.rings.values())


@pytest.mark.parametrize("recorded", [False, True], ids=["", "recorded"])
def test_it_dies_at_any_point(monkeypatch: pytest.MonkeyPatch, recorded: bool) -> None:
    """Of deaths in a row the next back-end has what the last one had, and new ones. The
    third one in a row comes when the requests of the first one are done, or one of them
    would be taken for the cause.
    """
    monkeypatch.setattr(recovery, "PERIOD", 0.0)
    back = ScriptedBack()
    also = [ProtocolFeature.INFLIGHT_SHMFD] if recorded else []
    with (
        Airlock(back, recover=True) as airlock,
        BlkGuest(num_queues=2, queue_size=SIZE, seg_max=4, also=also) as guest,
    ):
        guest.connect(airlock.channel())
        guest.start()
        load = Load(guest, back, 1)
        for number in range(1, DEATHS // 2 + 1):
            load.run(load.random.choice([0, load.random.randint(1, FEW), MANY]))
            while suspected(airlock):
                load.run(1)
            load.offer()
            die(load, load.random.choice(list(Death)))
            await_next(airlock, back, number)
            back.forget_seen()
        load.run(100)
        load.finish()
        counters = airlock.counters()
        assert counters["poisoned"] == counters["violations"] == 0
        assert all(not queue.driver.outstanding for queue in guest.queues)
        deaths = airlock.session.device.counters()["backend"]["losses"]
        assert deaths == DEATHS // 2
        print(f"{load.done} requests, {load.again} executed again, {deaths} deaths")
        guest.disconnect()
        airlock.join()
        back.close()
