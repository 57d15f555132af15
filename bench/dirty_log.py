# SPDX-License-Identifier: Apache-2.0
"""The cost of the dirty log for a guest that goes on while it migrates.

    python -m bench.dirty_log [SECONDS]

A front-end keeps reads in flight in one queue of a disk behind an airlock, and each
read writes guest memory. From time to time it switches the log on and off, as a VMM
does when a migration begins and ends (LOG_ALL). Two short windows next to each other in
time, without and with the log, make a pair. It prints the ratio of their rates, and of
the airlock's CPU time for a request.

No migration takes the bits out meanwhile: a VMM does that once in each pass through the
memory, which takes far longer than a window.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.machine import Watched, be_prompt, found_programs, placed
from bench.runs import KIB, MIB, BenchError
from bench.sure import Ratio
from bench.targets import back_end
from tests.real.airlock import airlock
from tests.real.programs import Programs, new_folder
from tests.support.dirty import LogFile
from vhost_airlock.peers.blk_load import LoadPlan, loaded
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.load import Load
from vhost_airlock.vhost.wire import Feature, ProtocolFeature

SIZE, DEPTH = 4 * KIB, 32
SPANS = {"in caches": 0, "over 64 MiB": 64 * MIB}
"""Bytes of guest memory that reads walk through; 0: as few as they need."""
WINDOW = 0.1
"""Seconds."""
MOST_WINDOWS = 100
SETTLE = 0.02
"""Seconds from a switch to the window: the airlock has paused."""
NEVER = (1 << 64) - 1


@dataclass(frozen=True)
class Window:
    """The load in a window."""

    rate: float
    """Requests a second."""
    cpu_us: float
    """CPU time of the airlock for a request."""


class Session:
    """A guest under load, its log, and the airlock that writes there."""

    def __init__(self, guest: BlkGuest, load: Load, proxy: Watched) -> None:
        self._guest = guest
        self._load = load
        self._proxy = proxy
        regions = [region for region, _ in guest.ram.shared()]
        self._log = LogFile.up_to(max(each.guest_addr + each.size for each in regions))
        told = self._log.told
        guest.front.set_log_base(told.size, told.offset, self._log.fd)

    def close(self) -> None:
        self._log.close()

    def begin(self) -> None:
        """Wait until the load runs."""
        self._await_requests(0)

    def window(self, logged: bool) -> Window:
        """Switch the log on or off, and look at the load then."""
        guest = self._guest
        guest.front.set_features(guest.features | (Feature.LOG_ALL if logged else 0))
        guest.front.barrier()
        self._log.take()
        time.sleep(SETTLE)
        began, done, cpu = self._sample()
        ended, all_done, all_cpu = self._await_requests(done)
        requests = all_done - done
        pages = len(self._log.take())
        if (pages > 0) != logged:
            raise BenchError(f"log {logged}: {requests} requests and {pages} pages")
        return Window(
            rate=requests / (ended - began) * 1e9,
            cpu_us=(all_cpu - cpu) / requests / 1e3,
        )

    def _await_requests(self, done: int) -> tuple[int, int, int]:
        """Return a sample after a window. Where other programs have the processors, it
        may take longer until more requests are done.
        """
        for _ in range(MOST_WINDOWS):
            time.sleep(WINDOW)
            sample = self._sample()
            if sample[1] > done:
                return sample
        raise BenchError(f"no request was done in {MOST_WINDOWS * WINDOW:.0f} s")

    def _sample(self) -> tuple[int, int, int]:
        """Return the time, the requests so far, and the airlock's CPU time, in ns."""
        requests = self._load.counters()["requests"]
        return time.monotonic_ns(), requests, self._proxy.cpu_ns()


def pairs(
    front: Path, proxy: Watched, span: int, seconds: float
) -> Generator[tuple[Window, Window]]:
    """Yield windows without and with the log, in one session."""
    plan = LoadPlan(size=SIZE, depth=DEPTH, span=span)
    also = [ProtocolFeature.LOG_SHMFD]
    with (
        loaded(str(front), plan, also) as (guest, [load]),
        ThreadPoolExecutor(1) as pool,
    ):
        session = Session(guest, load, proxy)
        with placed(0):
            running = pool.submit(load.run, 0, NEVER)
        try:
            session.begin()
            until = time.monotonic() + seconds
            first = False
            while time.monotonic() < until:
                found = {on: session.window(on) for on in (first, not first)}
                first = not first
                yield found[False], found[True]
        except BenchError:
            if running.done():
                running.result()  # raises the reason
            raise
        finally:
            load.stop()
            session.close()


def compare(found: list[tuple[Window, Window]]) -> str:
    rate = Ratio.of_pairs([on.rate / off.rate for off, on in found])
    cpu = Ratio.of_pairs([on.cpu_us / off.cpu_us for off, on in found])
    off, on = zip(*found, strict=True)
    return (
        f"{len(found)} pairs: rate {rate}, airlock's CPU time a request {cpu}; without"
        f" {statistics.median(each.rate for each in off):.0f} requests/s of"
        f" {statistics.median(each.cpu_us for each in off):.2f} us, with"
        f" {statistics.median(each.rate for each in on):.0f} of"
        f" {statistics.median(each.cpu_us for each in on):.2f}"
    )


def measure(programs: Programs, folder: Path, seconds: float) -> None:
    front = folder / "front.sock"
    with (
        back_end(programs, folder, core=1) as (_, back),
        airlock(back, front) as proxy,
    ):
        be_prompt()
        for name, span in SPANS.items():
            found = list(pairs(front, Watched(proxy.pid), span, seconds / len(SPANS)))
            print(f"{DEPTH} reads of 4 KiB, {name}: {compare(found)}", flush=True)


def main(seconds: float) -> int:
    programs = found_programs("qemu-storage-daemon")
    if programs is None:
        return 1
    with new_folder() as folder:
        measure(programs, folder, seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0))
