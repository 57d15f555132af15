# SPDX-License-Identifier: Apache-2.0
"""See it work: a guest, the airlock and a block back-end, and no other program.

The back-end and the airlock are processes of their own, as in real use; the guest, with
its driver and its VMM, is in this one. First the guest fills a disk and reads all of it
back. Then comes the proof: all memory and descriptors of the back-end's process are
searched for a random marker that stands in guest memory, once when the guest is
connected to it through the airlock, and once when it's connected directly. The search
also has to find another marker, which the guest writes to the disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..errors import AirlockError, SessionError
from ..peers.blk_process import BlkProcess, end
from ..peers.disk import SECTOR
from ..peers.guest import BlkGuest
from ..peers.scan import descriptors, mappings, search
from ..peers.workload import STAGES, Workload, disk_size
from ..process.signals import ending_on_signals
from ..process.sockets import Listener
from ..sandbox.syscalls import available
from ..vhost.fds import Fd
from .demo_report import Display, Proof, Report

QUEUES = 2
MARKER_SIZE = 64
BLOCK = 4096
"""Bytes of the disk beyond the workload's part, for the marker that is written."""
COUNTERS = "counters: "
"""The text before the counters in the airlock's log, when a session ends."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vhost-airlock demo`."""
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, and nothing else"
    )


def run(options: argparse.Namespace) -> int:
    """Run the demo; returns the exit status: 0 if the proof holds, 1 otherwise."""
    report = Report()
    display = Display(silent=options.json)
    started = time.monotonic()
    with ending_on_signals():
        try:
            _demo(report, display)
        except (AirlockError, OSError) as error:
            report.error = str(error)
        finally:
            display.clear()
    report.seconds = time.monotonic() - started
    if options.json:
        print(json.dumps(report.as_dict(), indent=2))
    elif report.error is None:
        display.conclude(report)
    if report.error is not None:
        print(f"vhost-airlock: demo: {report.error}", file=sys.stderr)
    return 0 if report.ok else 1


def _demo(report: Report, display: Display) -> None:
    with contextlib.ExitStack() as stack:
        # A disk in memory needs no cleaning up, and is as fast on every machine.
        disk = stack.enter_context(Fd(os.memfd_create("disk", os.MFD_CLOEXEC)))
        os.ftruncate(disk.fileno(), disk_size(STAGES) + BLOCK)
        image = f"/proc/{os.getpid()}/fd/{disk.fileno()}"
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="vhost-airlock-")
        )
        guest = stack.enter_context(BlkGuest(num_queues=QUEUES))
        marker = secrets.token_bytes(MARKER_SIZE)
        planted = len(guest.ram.plant(marker))

        with BlkProcess(image, f"{folder}/back.sock", num_queues=QUEUES) as back:
            with _Airlock(back.path, folder) as airlock:
                guest.connect(airlock.path)
                guest.start()
                _work(guest, report, display)
                display.progress("searching the back-end's process, behind the airlock")
                written = _write_marker(guest)
                isolated = search(back.pid, [marker, written])
                holds = [*descriptors(back.pid), *mappings(back.pid)]
                guest.stop()
                guest.disconnect()
            report.counters = airlock.counters

        with BlkProcess(image, f"{folder}/direct.sock", num_queues=QUEUES) as back:
            guest.connect(back.path)
            guest.start()
            display.progress("searching the back-end's process, directly connected")
            guest.flush()
            direct = search(back.pid, [marker, written])
            guest.stop()
            guest.disconnect()
        report.proof = Proof(marker, written, planted, direct, isolated, holds)


def _work(guest: BlkGuest, report: Report, display: Display) -> None:
    """Write the disk full, and read all of it back."""
    workload = Workload(guest, STAGES)
    total = 2 * disk_size(STAGES)
    done = 0

    def progress(size: int) -> None:
        nonlocal done
        done += size
        display.progress(f"{done >> 20} of {total >> 20} MiB", done / total)

    display.line("A guest writes a disk through the airlock:")
    for stage in STAGES:
        report.written.append(workload.write(stage, progress))
        display.result(report.written[-1])
    guest.flush()
    display.line("It reads all of it back, and compares:")
    for stage in STAGES:
        report.read.append(workload.read(stage, progress))
        display.result(report.read[-1])


def _write_marker(guest: BlkGuest) -> bytes:
    """Write another marker to the end of the disk; return it. The back-end gets it."""
    marker = secrets.token_bytes(MARKER_SIZE)
    block = guest.ram.alloc(BLOCK)
    guest.ram.view(block, MARKER_SIZE)[:] = marker
    guest.write(disk_size(STAGES) // SECTOR, [(block, BLOCK)])
    return marker


class _Airlock:
    """`vhost-airlock run` as a process of its own.

    At the end of the with block it's told to end. If the session failed, or it ends
    with an error itself, the exception has the last error in its log.
    """

    def __init__(self, backend: str, folder: str) -> None:
        self.path = f"{folder}/airlock.sock"
        self.counters: dict[str, dict[str, int]] = {}
        self._log = Path(folder, "airlock.log")
        with contextlib.ExitStack() as stack:
            listener = Listener(self.path)
            stack.callback(listener.socket.close)
            log = stack.enter_context(self._log.open("wb"))
            command = [sys.executable, "-m", "vhost_airlock", "run"]
            command += [f"--fd={listener.fileno()}", f"--backend={backend}"]
            if not available():
                command.append("--sandbox=off")  # the proof does not rest on it
            self.process = subprocess.Popen(
                [*command, "--log-level=debug"],
                pass_fds=[listener.fileno()],
                stderr=log,
            )

    def __enter__(self) -> _Airlock:
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        status = end(self.process)
        lines = self._log.read_text(errors="replace").splitlines()
        for line in lines:
            _, found, counters = line.partition(COUNTERS)
            if found:
                self.counters = json.loads(counters)
        if isinstance(error, SessionError) or (error is None and status):
            said = [line for line in lines if ": error: " in line]
            raise SessionError(
                f"{error or 'the guest was served'}; the airlock ended with status"
                f" {status} and said: {said[-1] if said else 'nothing'}"
            ) from error
