# SPDX-License-Identifier: Apache-2.0
"""The airlock is killed under load and started again, and the guest sees a pause.

The load is verified, see tests/support/journal.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.backs import ScriptedBack
from tests.support.journal import SIZE, Load
from tests.support.profiles import STRESS
from tests.support.program import Program, listening
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.vhost.wire import ProtocolFeature

KILLS = 500 if STRESS else 6


@pytest.fixture
def back() -> Iterator[ScriptedBack]:
    back = ScriptedBack()
    yield back
    back.close()


@pytest.mark.parametrize("base", ["used index", "avail index"])
@pytest.mark.parametrize("seed", [1])
def test_killed_under_load(
    tmp_path: Path, back: ScriptedBack, base: str, seed: int
) -> None:
    """Each base that a VMM tells will do: QEMU tells the used index, Cloud Hypervisor
    the avail index."""
    front = tmp_path / "front.sock"
    also = [ProtocolFeature.INFLIGHT_SHMFD]
    with (
        listening(back, tmp_path / "back.sock") as where,
        BlkGuest(num_queues=2, queue_size=SIZE, seg_max=4, also=also) as guest,
    ):
        load = Load(guest, back, seed)
        options = f"--socket-path={front}", f"--backend={where}"
        for _ in range(KILLS):
            with Program(*options) as program:
                resume(guest, program, front, base)
                load.run(load.random.randint(0, 150))
                load.offer()
                load.execute()
                program.process.kill()
                program.process.wait()
                load.lose()
        with Program(*options) as program:
            resume(guest, program, front, base)
            load.run(100)
            load.finish()
            guest.stop()
        assert all(not queue.driver.outstanding for queue in guest.queues)
        assert load.done >= 100
        print(f"{load.done} requests, {load.again} executed again, {KILLS} kills")


def resume(guest: BlkGuest, program: Program, front: Path, base: str) -> None:
    """Connect, with the record of the connection before."""
    guest.disconnect()
    guest.connect(program.connect(front))
    for queue in guest.queues:
        driver = queue.driver
        queue.base = driver.next_used if base == "used index" else driver.next_avail
    guest.start()
