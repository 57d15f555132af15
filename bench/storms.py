# SPDX-License-Identifier: Apache-2.0
"""The cost of a hostile guest or back for its airlock's other rings and the processor.

    python -m bench.storms

One worker has two rings. While one of them is attacked, requests of 64 bytes go one at
a time through the other, both ends of which are this program; then no requests do, and
the worker's own CPU time is measured. Figures are in docs/benchmark-tables.md.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.plane import Wired, World
from tests.support.racers import Racers, back_of, guest_of
from vhost_airlock.dataplane.worker import Worker

SECONDS = 3.0
STORM = "import os\nwhile True: os.eventfd_write({fd}, 1)"


def request(lane: Wired) -> None:
    lane.offer((0, 64), (4096, 64, True))
    lane.kick()
    lane.complete(lane.await_chain(), b"a" * 64)
    lane.call()
    lane.await_used()


@contextlib.contextmanager
def storm(fd: int) -> Iterator[None]:
    """Notifications without end, from a process of its own."""
    command = [sys.executable, "-c", STORM.format(fd=fd)]
    with subprocess.Popen(command, pass_fds=[fd]) as process:
        time.sleep(0.5)
        yield
        process.kill()


@contextlib.contextmanager
def flood(lane: Wired) -> Iterator[None]:
    """Requests of 4 KiB through the first ring without a pause, by threads in C."""
    for head in range(lane.size):
        lane.ring.write_desc(head, head * 4096, 4096, 0, 0)
    with tempfile.TemporaryDirectory() as folder:
        racers = Racers(Path(folder))
        with racers.racing(guest_of(lane, lane.size), back_of(lane)):
            yield


def measure(worker: Worker, thread: threading.Thread, lane: Wired) -> str:
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    times = []
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        start = time.perf_counter()
        request(lane)
        times.append((time.perf_counter() - start) * 1e6)
    times.sort()
    rounds = worker.counters()["rounds"]
    before = time.clock_gettime(clock)
    time.sleep(SECONDS)
    busy = (time.clock_gettime(clock) - before) / SECONDS
    rounds = worker.counters()["rounds"] - rounds
    return (
        f"{len(times) / SECONDS:9.0f} {statistics.median(times):11.0f} "
        f"{times[len(times) * 99 // 100]:9.0f} {busy:8.1%} {rounds / SECONDS:9.0f}"
    )


def main() -> None:
    events = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    worker = Worker(events, poll_us=200)
    thread = threading.Thread(target=worker.run)
    thread.start()
    world = World()
    victim, other = Wired(world, worker), Wired(world, worker)
    print("                requests/s   median us   99 % us   worker  rounds/s")
    attacks: dict[str, contextlib.AbstractContextManager[None]] = {
        "nothing": contextlib.nullcontext(),
        "guest's kicks": storm(victim.kick_in),
        "back's calls": storm(victim.call_in),
        "requests": flood(victim),
    }
    for name, attack in attacks.items():
        with attack:
            print(f"{name:16} {measure(worker, thread, other)}", flush=True)
    worker.stop()
    thread.join()


if __name__ == "__main__":
    main()
