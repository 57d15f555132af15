# SPDX-License-Identifier: Apache-2.0
"""The start of an airlock: until it is ready for a VMM, and its memory then.

A machine may have an airlock for each device of each guest, and a guest's start waits
for all of its own.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.machine import Watched, memory_of
from bench.runs import BenchError
from tests.real.processes import Process

PATIENCE = 60.0
"""Seconds that a start may take."""
KEEP_COMPILED = {"PYTHONDONTWRITEBYTECODE": ""}
"""Python keeps compiled modules, as an installed package has them."""


@dataclass(frozen=True)
class Start:
    """One start of an airlock, until it is ready."""

    seconds: float
    cpu_seconds: float
    own: int
    """Bytes of memory that are in no file, and that no other process has."""


def starts(back: Path, folder: Path, rounds: int) -> list[Start]:
    """Start an airlock some times, one after the other."""
    # The first one brings its modules into memory, and may have to compile them.
    return [start(back, folder) for _ in range(rounds + 1)][1:]


def start(back: Path, folder: Path) -> Start:
    """Start an airlock for this back-end, wait until it is ready, and end it."""
    news = folder / "news.sock"
    front = folder / "start.sock"
    run = (sys.executable, "-m", "vhost_airlock", "run", f"--socket-path={front}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(news))
        begin = time.monotonic()
        env = {**KEEP_COMPILED, "NOTIFY_SOCKET": str(news)}
        log = folder / "start.log"
        with Process([*run, f"--backend={back}"], log, env=env) as process:
            await_news(heard, process)
            seconds = time.monotonic() - begin
            cpu = Watched(process.pid).cpu_ns() / 1e9
            own = memory_of(process.pid)[1]
            process.stop()
    news.unlink()
    return Start(seconds, cpu, own)


def await_news(heard: socket.socket, process: Process) -> None:
    """Wait until a process says that it is ready."""
    news = b""
    watched: list[socket.socket | int] = [heard, process.pidfd]
    while b"READY=1" not in news:
        ready, _, _ = select.select(watched, [], [], PATIENCE)
        if heard not in ready:
            raise BenchError(f"an airlock does not start:\n{process.describe()}")
        news = heard.recv(4096)
