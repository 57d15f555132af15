# SPDX-License-Identifier: Apache-2.0
"""Real back-ends are killed at any moment, and started again. Their front-ends, which
know nothing of it, only wait.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.guest import devices
from tests.guest.inside import blocks
from tests.guest.machine import Guest
from tests.real.airlock import airlock
from tests.real.processes import Process
from tests.real.programs import Programs
from tests.real.stalling_nbd import NbdDisk, stalling_nbd
from tests.real.storage import Disk, StorageDaemon, start_daemon
from tests.support.backs import wait_until
from tests.support.profiles import STRESS
from vhost_airlock.cli.stats_document import Document, ask, parse

MIB = 1 << 20
COUNT = 80
"""Requests in flight at a disk that stalls."""
AT_ONCE = 16
"""How many of them qemu-storage-daemon has at the NBD server at once."""
DEATHS = 250 if STRESS else 4
OFTEN = f"--recover-times={DEATHS + 1}"


class Mortal:
    """A disk's back-end that dies and comes back, behind an airlock."""

    def __init__(self, programs: Programs, disk: Disk, folder: Path) -> None:
        self.programs = programs
        self.disk = disk
        self.back = folder / "back.sock"
        self.front = folder / "front.sock"
        self.stats = folder / "stats.sock"
        self.daemon: StorageDaemon | None = None

    @contextmanager
    def served(self) -> Iterator[Process]:
        options = ("--device-type=block", f"--stats-path={self.stats}", OFTEN)
        with ExitStack() as stack:
            stack.callback(self.kill)
            self.start()
            yield stack.enter_context(airlock(self.back, self.front, *options))

    def start(self) -> None:
        self.back.unlink(missing_ok=True)
        self.daemon = start_daemon(self.programs, self.disk, self.back)

    def kill(self) -> None:
        if self.daemon is not None:
            self.daemon.kill()

    def document(self) -> Document:
        return parse(ask(str(self.stats)), str(self.stats))

    def await_progress(self) -> None:
        """Wait until some more requests are done, and some are in flight."""
        done = self.document().total("ring", "completions")

        def works() -> bool:
            now = self.document()
            return (
                now.total("ring", "completions") > done + 50
                and now.total("ring", "outstanding") > 0
            )

        wait_until(works, "requests are done")

    @property
    def losses(self) -> int:
        return self.document().total("backend", "losses")


@pytest.mark.parametrize("aio", ["threads", "io_uring"])
@pytest.mark.parametrize("direct", [False, True], ids=["cached", "uncached"])
def test_disk_under_verified_load(programs, drive, folder, aio, direct):
    """libblkio's program knows what each sector must hold."""
    image = folder / "disk.img"
    image.write_bytes(bytes(32 * MIB))
    disk = Disk(image, queues=2, direct=direct, aio=aio)
    mortal = Mortal(programs, disk, folder)
    options = {"queues": 2, "qd": 8, "passes": 10**6, "max": 128 << 10}
    with mortal.served() as proxy:
        fds = []
        with drive.start(mortal.front, "verify", **options) as load:
            for _ in range(DEATHS):
                mortal.await_progress()
                mortal.kill()
                mortal.start()
                mortal.await_progress()
                assert not load.ended(), load.describe()
                fds.append(len(os.listdir(f"/proc/{proxy.pid}/fd")))
            assert mortal.losses == DEATHS
            assert fds[-1] == fds[1]
            load.popen.send_signal(signal.SIGUSR1)
            assert load.wait(timeout=100) == 0, load.describe()


def test_guest_sees_a_pause(programs, folder):
    """80 requests are in flight when the back-end dies, 16 of them at its server."""
    path = folder / "nbd.sock"
    with stalling_nbd(path, blocks.image(COUNT)) as nbd:
        mortal = Mortal(programs, NbdDisk(server=path, queues=2), folder)
        with (
            mortal.served(),
            Guest(programs, folder, devices.disk(mortal.front), cpus=2) as guest,
        ):
            nbd.stall()
            guest.call(blocks.start, COUNT, 1)
            nbd.wait_for_kept(AT_ONCE)
            mortal.kill()
            nbd.go_on_without_client()
            mortal.start()
            assert guest.call(blocks.finish) == []
            blocks.check(nbd.content, COUNT, 1)
            assert mortal.losses == 1
            guest.power_off()
