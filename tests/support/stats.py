# SPDX-License-Identifier: Apache-2.0
"""Documents of airlocks, and servers that tell them."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from vhost_airlock.cli.stats_document import Document
from vhost_airlock.cli.stats_table import MIB

RING = {
    "chains": 1000,
    "completions": 900,
    "bytes_in": 10 * MIB,
    "bytes_out": 20 * MIB,
    "kicks": 100,
    "calls": 90,
    "outstanding": 7,
}
WORKER = {"rounds": 5000, "sleeps": 50, "polled": 1_000_000_000}
BEFORE = Document(
    name="disk.sock",
    version="1.2.3",
    uptime=100.0,
    sessions=2,
    vmm_connected=True,
    vmm_waits=False,
    backend_connected=True,
    rings={
        "ring 0": {"phase": "running", "fault": None},
        "ring 1": {"phase": "disabled", "fault": "it fell over"},
        "ring 2": {"phase": "stopped", "fault": None},
    },
    counters={
        "ring 0": RING,
        "ring 1": dict.fromkeys(RING, 0),
        "worker 0": WORKER,
        "worker 1": dict.fromkeys(WORKER, 0),
        "pool": {"used": 4096, "resident": 8192},
    },
)


def later(seconds: float, **more: dict[str, int]) -> Document:
    """BEFORE after so long, with so much more of some counters."""
    counters = {group: dict(each) for group, each in BEFORE.counters.items()}
    for group, added in more.items():
        for name, value in added.items():
            counters[group.replace("_", " ")][name] += value
    return replace(BEFORE, uptime=BEFORE.uptime + seconds, counters=counters)


@contextmanager
def answering(
    path: Path, answers: Sequence[bytes], before: Callable[[], object] = int
) -> Iterator[str]:
    """Listen, and give these answers, each after a call of `before`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            for answer in answers:
                with listener.accept()[0] as sock:
                    before()
                    if answer:  # an empty packet is taken for the end
                        sock.send(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield str(path)
        thread.join()


def encoded(document: Document) -> bytes:
    return json.dumps(vars(document)).encode()
