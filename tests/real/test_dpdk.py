"""DPDK's virtio-user and vhost, direct and through the airlock."""

from functools import partial
from itertools import chain
from pathlib import Path

import pytest

from tests.guest import devices
from tests.guest.inside import frames
from tests.guest.machine import Guest
from tests.real.airlock import reach
from tests.real.testpmd import PacketFiles, Testpmd

COUNT = 3000
COUNT_OF_GUEST = 1500
"""An emulated guest takes its time."""


def some_frames(
    seed: int, queues: int, largest: int, count: int = COUNT
) -> list[list[bytes]]:
    """Frames for each queue."""
    return [list(frames.frames(seed + i, count, largest)) for i in range(queues)]


def vhost(path: Path, queues: int = 1) -> str:
    return f"net_vhost0,iface={path},queues={queues}"


@pytest.mark.parametrize(
    ("mode", "queues", "largest", "options"),
    [
        pytest.param("loop", 1, 9000, "mrg_rxbuf=1", id="loop-mergeable"),
        pytest.param("loop", 1, 1514, "mrg_rxbuf=0", id="loop-unmergeable"),
        pytest.param("loop", 2, 9000, "mrg_rxbuf=1", id="loop-two-mergeable"),
        pytest.param("loop", 2, 1514, "mrg_rxbuf=0", id="loop-two-unmergeable"),
        pytest.param("exchange", 1, 9000, "mrg_rxbuf=1", id="exchange-mergeable"),
        pytest.param("exchange", 2, 1514, "mrg_rxbuf=0", id="exchange-two-unmergeable"),
        pytest.param("loop", 1, 1514, "packed_vq=1", id="packed"),
    ],
)
def test_packets_are_the_same(programs, folder, via, mode, queues, largest, options):
    """Each packet arrives once, in order, in its queue.

    Either the back-end sends back what it gets, or both send packets of their own.
    Packed rings are asked for, but the airlock offers none.
    """
    ours = PacketFiles(folder / "ours", some_frames(0, queues, largest))
    theirs = PacketFiles(folder / "theirs", some_frames(10, queues, largest))
    path = folder / "back.sock"
    ends = {"queues": queues, "largest": largest}
    backs = [vhost(path, queues)] + ([theirs.device] if mode == "exchange" else [])
    workers = f"--workers={queues}"
    with (
        Testpmd(programs, folder / "back.log", backs, **ends) as back,
        reach(via, path, "--device-type=net", workers) as front_path,
        Testpmd(
            programs,
            folder / "front.log",
            [
                f"net_virtio_user0,path={front_path},queues={queues},{options}",
                ours.device,
            ],
            **ends,
        ) as front,
    ):
        back("start")
        front("start")
        total = COUNT * queues
        for end, ports in ((front, 2), (back, len(backs))):
            counts = [(total, total)] * ports
            end.wait_until(partial(end.has_counted, *counts), timeout=60)
        front.quit()
        back.quit()
    if mode == "loop":
        assert ours.kept() == ours.packets
    else:
        assert ours.kept() == theirs.packets
        assert theirs.kept() == ours.packets


@pytest.mark.parametrize("pairs", [1, 2])
def test_pauses_of_a_guest_lose_no_frame(programs, folder, via, pairs):
    """QEMU stops ten times, while both ends send. Nobody sends anything again."""
    theirs = PacketFiles(folder / "theirs", some_frames(1, pairs, 1514, COUNT_OF_GUEST))
    path = folder / "back.sock"
    devices_of_back = [vhost(path, pairs), theirs.device]
    with (
        Testpmd(programs, folder / "back.log", devices_of_back, queues=pairs) as back,
        reach(via, path, "--device-type=net", f"--workers={pairs}") as front,
        Guest(programs, folder, devices.net(front, pairs), cpus=pairs) as guest,
    ):
        guest.sh("ip link set eth0 up")
        guest.call(frames.listen)
        back("start")
        total = COUNT_OF_GUEST * pairs
        incoming = [1 + i for i in range(pairs)]
        call = guest.begin(frames.exchange, incoming, 10, COUNT_OF_GUEST, 1514)
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
