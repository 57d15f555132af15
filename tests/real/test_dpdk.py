# SPDX-License-Identifier: Apache-2.0
"""DPDK's virtio-user and vhost, direct and through the airlock."""

from functools import partial

import pytest

from tests.guest.inside.frames import frames
from tests.real.airlock import reach
from tests.real.testpmd import PacketFiles, Testpmd, vhost

pytestmark = pytest.mark.long

COUNT = 3000


def some_frames(seed: int, queues: int, largest: int) -> list[list[bytes]]:
    """Frames for each queue."""
    return [list(frames(seed + i, COUNT, largest)) for i in range(queues)]


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
