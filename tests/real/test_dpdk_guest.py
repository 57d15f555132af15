# SPDX-License-Identifier: Apache-2.0
"""A guest's network: DPDK's vhost, direct and through the airlock."""

from functools import partial
from itertools import chain

import pytest

from tests.guest import devices
from tests.guest.booted import booted
from tests.guest.inside import frames
from tests.real.airlock import reach
from tests.real.testpmd import PacketFiles, Testpmd, vhost
from tests.support.profiles import STRESS

COUNT = 1000 if STRESS else 500
"""An emulated guest takes its time."""


@pytest.mark.parametrize("via", ["direct", "airlock"])
@pytest.mark.parametrize("pairs", [1, 2] if STRESS else [2])
def test_pauses_of_a_guest_lose_no_frame(programs, folder, via, pairs):
    """QEMU stops ten times, while both ends send. Nobody sends anything again."""
    packets = [list(frames.frames(1 + i, COUNT, 1514)) for i in range(pairs)]
    theirs = PacketFiles(folder / "theirs", packets)
    path = folder / "back.sock"
    devices_of_back = [vhost(path, pairs), theirs.device]
    with (
        Testpmd(programs, folder / "back.log", devices_of_back, queues=pairs) as back,
        reach(via, path, "--device-type=net", f"--workers={pairs}") as front,
        booted(programs, folder, devices.net(front, pairs), cpus=pairs) as guest,
    ):
        guest.sh("ip link set eth0 up")
        guest.call(frames.listen)
        back("start")
        total = COUNT * pairs
        incoming = [1 + i for i in range(pairs)]
        call = guest.begin(frames.exchange, incoming, 10, COUNT, 1514)
        for part in range(10):
            back.wait_until(partial(back.has_sent, total * part // 10), timeout=60)
            guest.qmp("stop")
            guest.qmp("cont")
        call.result()
        guest.power_off()
        back.quit()
    sent = list(frames.frames(10, total, 1514))
    places = {frame: place for place, frame in enumerate(sent)}
    kept = [
        [places[packet] for packet in packets if packet in places]
        for packets in theirs.kept()
    ]
    assert sorted(chain.from_iterable(kept)) == list(range(total))
    assert kept == [sorted(places_of_queue) for places_of_queue in kept]
