# SPDX-License-Identifier: Apache-2.0
"""The programs that put a load on a target, and print the results as JSON.

libblkio's vhost-user-blk driver is a real front-end, but knows neither indirect
descriptors nor large areas of memory: `vhost-airlock bench` does. NBD has a small
client of its own. All three wait until at least one request is done, take all that are
done, and submit as many again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench.machine import placed
from bench.runs import MIB, BenchError, Case
from tests.real.blkdrive import BlkDrive
from tests.real.processes import Process
from tests.real.programs import PROJECT, Programs

QUEUE_SIZE = 512
"""libblkio has no indirect descriptors: 128 requests take 384 of them."""
COLD = 256 * MIB
"""Memory of each queue that requests walk through, if it's to be in no cache."""
WARMUP = 0.15
"""Seconds, in which an airlock that polls has had its first trial of that."""


class Fronts:
    """They can be started against a socket. `core`: where they run, see placed()."""

    def __init__(
        self, programs: Programs, folder: Path, ms: int, core: int | None = None
    ) -> None:
        self.folder = folder
        self.ms = ms
        self.core = core
        self._blkdrive = BlkDrive(programs, folder)
        self._nbddrive = compiled(Path(__file__).with_name("nbddrive.c"))
        self._runs = 0

    def blkio(self, front: Path, case: Case, *, busy: bool) -> Process:
        return self._blkdrive.start(
            front,
            case.mode,
            bs=case.size,
            qd=case.depth,
            queues=case.queues,
            queue_size=QUEUE_SIZE,
            poll=int(busy),
            ms=self.ms,
            warmup=int(WARMUP * 1000),
        )

    def ring(self, front: Path, case: Case, *, busy: bool) -> Process:
        words = [
            *(sys.executable, "-m", "vhost_airlock", "bench", f"--socket-path={front}"),
            *(f"--mode={case.mode}", f"--size={case.size}", f"--depth={case.depth}"),
            *(f"--queues={case.queues}", f"--seconds={self.ms / 1000}"),
            *("--rounds=1", "--json"),
        ]
        words += [f"--span={COLD}"] if case.cold else []
        words += [] if case.indirect else ["--no-indirect"]
        words += ["--busy-wait"] if busy else []
        return self._start(words)

    def nbd(self, front: Path, case: Case, *, busy: bool) -> Process:
        options = {
            "bs": case.size,
            "qd": case.depth,
            "queues": case.queues,
            "span": COLD if case.cold else 0,
            "poll": int(busy),
            "ms": self.ms,
            "warmup": int(WARMUP * 1000),
        }
        words = [f"{name}={value}" for name, value in options.items()]
        with placed(self.core):
            return self._start([str(self._nbddrive), str(front), case.mode, *words])

    def vhost(self, front: Path, case: Case, *, busy: bool) -> Process:
        """Start the program that supports the case."""
        special = case.indirect or case.cold or not case.mode.startswith("rand")
        start = self.ring if special else self.blkio
        with placed(self.core):
            return start(front, case, busy=busy)

    def _start(self, argv: list[str]) -> Process:
        self._runs += 1
        return Process(argv, self.folder / f"front-{self._runs}.log")


def compiled(source: Path) -> Path:
    """Build a C program of this folder, if its source is newer than the program."""
    program = PROJECT / "build" / source.stem
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        program.parent.mkdir(exist_ok=True)
        new = program.with_suffix(f".{os.getpid()}")  # others may build it too
        gcc = ["gcc", "-O2", "-Wall", "-Wextra", "-pthread", "-o", str(new)]
        done = subprocess.run([*gcc, str(source)], capture_output=True, text=True)
        if done.returncode:
            raise BenchError(f"can't compile {source.name}: {done.stderr}")
        new.replace(program)
    return program
