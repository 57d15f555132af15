# SPDX-License-Identifier: Apache-2.0
"""The time for which a guest stands still when it moves to another QEMU.

    python -m bench.downtime [PAIRS]

There are two guests, one with airlocks and one without, and they move in turns: from
a QEMU with back-ends of its own to another one, on this host, with fio on the disk in
the midst of its work. The other guest is paused meanwhile. QEMU says for how long the
guest stood still, until it ran at the destination (return-path). Two moves next to each
other in time make a pair.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.machine import found_programs
from bench.sure import Ratio
from bench.targets import DIRECT
from tests.guest import devices
from tests.guest.inside import files, load
from tests.guest.machine import Guest
from tests.guest.migration import tell_events, wait_for
from tests.real.airlock import reach
from tests.real.backends import virtiofsd
from tests.real.programs import Programs, new_folder
from tests.real.storage import Disk, storage_daemon

WAYS = (DIRECT, "airlock")
CASES = {"disk": False, "disk, shared folder with open files": True}
"""With a shared folder?"""
DISK_SIZE = 64 << 20
MEMORY = "384M"
PAIRS = 10


class Traveller:
    """A guest that is at its work, and can move."""

    def __init__(
        self, programs: Programs, folder: Path, way: str, with_share: bool
    ) -> None:
        self._programs = programs
        self._folder = folder
        self._way = way
        self._moves = 0
        self._image = folder / "disk.img"
        self._share = folder / "share" if with_share else None
        folder.mkdir()
        with self._image.open("wb") as file:
            file.truncate(DISK_SIZE)
        with ExitStack() as stack:
            if self._share:
                self._share.mkdir()
            self._guest = stack.enter_context(self._place(None))
            if self._share:
                self._guest.sh("mount -t virtiofs share /mnt")
                self._guest.call(files.hold, "/mnt", False)
            self._guest.call(load.start, 1)
            self._guest.call(load.go_on)
            self._stack = stack.pop_all()
        self.pause()

    def close(self) -> None:
        self._stack.close()

    def pause(self) -> None:
        self._guest.qmp("stop")

    def move(self) -> float:
        """Move while fio works: the milliseconds for which the guest stood still."""
        here = self._guest
        here.qmp("cont")
        here.call(load.progress)
        with ExitStack() as stack:
            there = stack.enter_context(self._place(here))
            path = self._folder / "migration"
            path.unlink(missing_ok=True)
            tell_events(here, there)
            returns = {"capability": "return-path", "state": True}
            for guest in (here, there):
                guest.qmp("migrate-set-capabilities", capabilities=[returns])
            there.qmp("migrate-incoming", uri=f"unix:{path}")
            there.qmp("cont")
            here.qmp("migrate-set-parameters", max_bandwidth=0)
            here.qmp("migrate", uri=f"unix:{path}")
            for guest in (here, there):
                wait_for(guest, "completed")
            downtime: float = here.qmp("query-migrate")["downtime"]
            there.agent.take_over(here.agent)
            self._stack.close()
            self._stack, self._guest = stack.pop_all(), there
        there.call(load.progress)
        if self._share:
            there.call(files.check_held)
        self.pause()
        return downtime

    @contextmanager
    def _place(self, source: Guest | None) -> Iterator[Guest]:
        """Back-ends, maybe airlocks, and a QEMU in which the guest is, or will be."""
        self._moves += 1
        folder = self._folder / f"{self._moves}"
        folder.mkdir()
        programs, way = self._programs, self._way
        with ExitStack() as stack:
            enter = stack.enter_context
            disk = Disk(self._image, locking="off" if source else "auto")
            _, back = enter(storage_daemon(programs, disk, folder / "disk.sock"))
            front = enter(reach(way, back, "--device-type=block"))
            has = [devices.disk(front), devices.FIO]
            if self._share:
                back = folder / "fs.sock"
                enter(virtiofsd(programs, self._share, back))
                front = enter(reach(way, back, "--device-type=fs"))
                has.append(devices.file_system(front, "share"))
            guest = Guest(programs, folder, *has, memory=MEMORY, source=source)
            yield enter(guest)
            guest.kill()


def measure(
    programs: Programs, folder: Path, with_share: bool, pairs: int
) -> list[dict[str, float]]:
    """Move both guests in turns: for each pair, the downtime by way."""
    with ExitStack() as stack:
        travellers = {}
        for way in WAYS:
            traveller = Traveller(programs, folder / way, way, with_share)
            stack.callback(traveller.close)
            travellers[way] = traveller
        found = []
        for number in range(pairs):
            order = WAYS if number % 2 else WAYS[::-1]
            found.append({way: travellers[way].move() for way in order})
        return found


def report(found: list[dict[str, float]]) -> str:
    direct, airlock = ([pair[way] for pair in found] for way in WAYS)
    differences = [ours - theirs for ours, theirs in zip(airlock, direct, strict=True)]
    return "\n".join(
        [
            f"  direct / airlock: {', '.join(map(pair_of, found))} ms",
            f"  medians {statistics.median(direct):.0f}"
            f" and {statistics.median(airlock):.0f} ms,"
            f" of the differences {statistics.median(differences):+.0f} ms,"
            " of the ratios"
            f" {Ratio.of_pairs([pair['airlock'] / pair[DIRECT] for pair in found])}",
        ]
    )


def pair_of(pair: dict[str, float]) -> str:
    return " / ".join(f"{pair[way]:.0f}" for way in WAYS)


def main(pairs: int) -> int:
    programs = found_programs("QEMU and its back-ends")
    if programs is None:
        return 1
    for name, with_share in CASES.items():
        with new_folder() as folder:
            found = measure(programs, folder, with_share, pairs)
        print(f"{name}:\n{report(found)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else PAIRS))
