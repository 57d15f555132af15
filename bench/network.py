# SPDX-License-Identifier: Apache-2.0
"""Packets a second between DPDK's virtio-user and its vhost: both poll, all the time.

Each end has a core of its own, as far as there are two. The airlock's worker has to
find its time on these, so with two cores a ratio is mostly that of CPU time.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

from bench.extras import Figure, way_to
from bench.runs import BenchError
from tests.real.processes import Process, listening
from tests.real.programs import Programs
from tests.real.testpmd import vhost

CASES = {
    "net, to the back-end": ("txonly", "rxonly"),
    "net, to the front-end": ("rxonly", "txonly"),
    "net, there and back": ("flowgen", "macswap"),
}
"""The uses of front-end and back-end for packets of 64 bytes."""

RATE = re.compile(r"Rx-pps: +(\d+)")
SKIPPED = 2
"""Seconds until the rate is steady."""
SECONDS = 3
PATIENCE = 60.0


class Network:
    """Measures one target after the other."""

    def __init__(self, programs: Programs, folder: Path) -> None:
        self.programs = programs
        self.folder = folder
        self.runs = 0

    def __call__(self, name: str) -> Mapping[str, Figure]:
        return {case: self.measure(name, *modes) for case, modes in CASES.items()}

    def measure(self, name: str, front_mode: str, back_mode: str) -> Figure:
        """Return million packets in a second, by the end that receives them."""
        self.runs += 1
        folder = self.folder / f"net-{self.runs}"
        folder.mkdir()
        path = folder / "back.sock"
        log = folder / "back.log"
        with self.testpmd(log, vhost(path), back_mode, core=0) as back:
            back.wait_until(lambda: listening(path), PATIENCE)
            with way_to(name, path, "--device-type=net") as (front_path, proxy):
                device = f"net_virtio_user0,path={front_path},queues=1,queue_size=1024"
                with self.testpmd(folder / "front.log", device, front_mode, 1) as front:
                    receiver = back if back_mode == "rxonly" else front
                    wait_for(receiver, SKIPPED)
                    begin, cpu = time.monotonic(), proxy.cpu_ns() if proxy else 0
                    rates = wait_for(receiver, SKIPPED + SECONDS)[SKIPPED:]
                    seconds = time.monotonic() - begin
                    cores = (proxy.cpu_ns() - cpu) / 1e9 / seconds if proxy else None
        return Figure(statistics.median(rates) / 1e6, "Mpackets/s", cores)

    def testpmd(self, log: Path, device: str, mode: str, core: int) -> Process:
        cpus = sorted(os.sched_getaffinity(0))
        core = cpus[core % len(cpus)]
        argv = self.programs(
            *("stdbuf", "-oL", self.programs.find("dpdk-testpmd")),
            *("--no-huge", "--in-memory", "-m", "512", "--no-pci", "--no-telemetry"),
            *("--lcores", f"0@{core},1@{core}", f"--vdev={device}"),
            *("--", "--nb-cores=1", "--rxq=1", "--txq=1", "--no-lsc-interrupt"),
            *("--total-num-mbufs=16384", "--txpkts=64", "--stats-period=1"),
            *(f"--forward-mode={mode}", "--auto-start"),
        )
        return Process(argv, log)


def wait_for(end: Process, count: int) -> list[int]:
    """Return the first rates that aren't zero, one of each second."""

    def rates() -> list[int]:
        return [rate for rate in map(int, RATE.findall(end.output())) if rate]

    try:
        end.wait_until(lambda: len(rates()) >= count, PATIENCE)
    except AssertionError as error:
        raise BenchError(str(error)) from None
    return rates()[:count]
