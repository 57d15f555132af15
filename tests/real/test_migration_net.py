# SPDX-License-Identifier: Apache-2.0
"""A guest moves with a network card of two pairs of queues, under traffic.

DPDK's testpmd sends back what it gets, at either place. It polls, and so do airlocks
then: this is for `make stress`.
"""

from contextlib import ExitStack

import pytest

from tests.guest import devices
from tests.guest.inside import echoes
from tests.guest.machine import Guest
from tests.guest.migration import Migration
from tests.real.airlock import reach
from tests.real.testpmd import Testpmd, vhost
from tests.support.profiles import STRESS

pytestmark = pytest.mark.skipif(not STRESS, reason="make stress runs it")

PAIRS = 2
HELD = 48 << 20
MOST_LOST = 3
"""Rounds with a lost frame: at the change, and when the guest was very slow."""


def test_frames_come_back_as_they_were_sent(programs, folder, via):
    with ExitStack() as stack:
        guests: list[Guest] = []
        backs = []
        for name in ("source", "destination"):
            place = folder / name
            place.mkdir()
            path = place / "back.sock"
            log = place / "testpmd.log"
            vdev = [vhost(path, PAIRS)]
            backs.append(
                stack.enter_context(Testpmd(programs, log, vdev, queues=PAIRS))
            )
            front = stack.enter_context(reach(via, path, "--device-type=net"))
            device = devices.net(front, PAIRS)
            source = guests[0] if guests else None
            guest = Guest(programs, place, device, cpus=PAIRS, source=source)
            guests.append(stack.enter_context(guest))
            backs[-1]("start")
            if not source:
                guest.sh("ip link set eth0 up")
                guest.call(echoes.start)
                guest.call(echoes.go_on)
        here, there = guests
        with Migration(here, there, folder / "migration", HELD) as moving:
            here.call(echoes.go_on)
            moving.finish()
        there.call(echoes.go_on)
        assert there.call(echoes.stop) <= MOST_LOST
        here.kill()
        there.power_off()
        for back in backs:
            back.quit()
