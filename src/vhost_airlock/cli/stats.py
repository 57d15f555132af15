# SPDX-License-Identifier: Apache-2.0
"""`vhost-airlock stats`: gets the state of a running airlock, and shows it."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice, pairwise
from typing import Any, Self

from ..errors import StartError, UsageError
from .arguments import interval, number

MIB = 1 << 20
PATIENCE = 5.0
"""Seconds that the airlock has to answer."""
LARGEST = 16 * MIB
"""The most bytes of an answer: an airlock's is shorter."""
COLUMNS = 4
"""Rings that stand side by side."""
HEADING = 20
"""Lines of rates after which the heading comes again."""

GAUGES = {
    *("outstanding", "quarantined", "used", "high_water"),
    *("resident", "regions", "window"),
}
"""Counters that can become less."""


@dataclass(frozen=True)
class Document:
    """The state of an airlock at one moment, by its own account."""

    name: str
    version: str
    uptime: float
    sessions: int
    vmm_connected: bool
    vmm_waits: bool
    """A VMM is connected, and not served yet: for want of the back-end, or since
    another VMM is served."""
    backend_connected: bool
    rings: dict[str, dict[str, str | None]]
    counters: dict[str, dict[str, int]]

    @classmethod
    def of(cls, data: Any) -> Self:
        """Take the known fields. ValueError, KeyError, TypeError: one is missing or of
        a wrong type.
        """
        document = cls(**{name: data[name] for name in cls.__dataclass_fields__})
        groups: list[dict[str, Any]] = [document.rings, document.counters]
        if not all(
            isinstance(each, dict) for group in groups for each in group.values()
        ):
            raise ValueError("rings and counters are no objects")
        return document

    def total(self, kind: str, name: str) -> int:
        """Return the sum of a counter over all rings, or over all workers."""
        groups = self.counters.items()
        return sum(each.get(name, 0) for key, each in groups if key.startswith(kind))


@dataclass(frozen=True)
class Rates:
    """The rates between two documents, for each second or each request."""

    requests: float
    mib_in: float
    """From the guest to the back-end."""
    mib_out: float
    kicks: float | None
    """For each request; None: there were no requests."""
    calls: float | None
    sleeps: float
    polling: float
    """The share of the workers' time."""
    outstanding: int

    @classmethod
    def between(cls, before: Document, after: Document) -> Self:
        """Return the rates. A new session, or a new process, has counted from zero."""
        seconds = after.uptime - before.uptime
        restarted = seconds <= 0
        fresh = restarted or after.sessions != before.sessions
        if restarted:
            seconds = max(after.uptime, 1e-6)

        def more(kind: str, name: str) -> int:
            base = 0 if fresh else before.total(kind, name)
            return max(0, after.total(kind, name) - base)

        chains, done = more("ring", "chains"), more("ring", "completions")
        workers = sum(key.startswith("worker") for key in after.counters)
        return cls(
            requests=done / seconds,
            mib_in=more("ring", "bytes_in") / MIB / seconds,
            mib_out=more("ring", "bytes_out") / MIB / seconds,
            kicks=more("ring", "kicks") / chains if chains else None,
            calls=more("ring", "calls") / done if done else None,
            sleeps=more("worker", "sleeps") / seconds,
            polling=more("worker", "polled") / 1e9 / seconds / max(1, workers),
            outstanding=after.total("ring", "outstanding"),
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vhost-airlock stats`."""
    parser.add_argument("path", metavar="PATH", help="its --stats-path")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print its answer unchanged")
    form.add_argument(
        "--prometheus", action="store_true", help="print the text format of Prometheus"
    )
    form.add_argument(
        "--interval", type=interval, metavar="S", help="print rates, every S seconds"
    )
    parser.add_argument(
        "--count", type=number(1), metavar="N", help="print N times (default: for ever)"
    )


def run(options: argparse.Namespace) -> int:
    """Ask and print."""
    if options.count is not None and options.interval is None:
        raise UsageError("--count goes with --interval")
    if options.interval is not None:
        with contextlib.suppress(KeyboardInterrupt):
            _watch(options.path, options.interval, options.count)
        return 0
    form: Callable[[Document], str] = table
    if options.prometheus:
        form = prometheus
    text = ask(options.path)
    document = parse(text, options.path)
    print(text.rstrip() if options.json else form(document))
    return 0


def _watch(path: str, interval: float, count: int | None) -> None:
    def documents() -> Iterator[Document]:
        due = time.monotonic()
        while True:
            yield parse(ask(path), path)
            now = time.monotonic()
            due = max(due + interval, now)
            time.sleep(due - now)

    pairs = islice(pairwise(documents()), count)
    for line, (before, after) in enumerate(pairs):
        if line % HEADING == 0:
            print(" ".join(f"{name:>{width}}" for name, width, _ in RATES), flush=True)
        print(rates_line(Rates.between(before, after)), flush=True)


def ask(path: str) -> str:
    """Return the answer of the airlock at this path. StartError: there is none."""
    until = time.monotonic() + PATIENCE
    data = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(PATIENCE)
        try:
            _connect(sock, path, until)
            while part := sock.recv(1 << 16):
                data += part
                sock.settimeout(max(0.001, until - time.monotonic()))
                if len(data) > LARGEST:
                    raise StartError(f"no airlock's stats at {path}: it says too much")
        except OSError as error:
            reason = error.strerror or "no answer"
            if error.errno == errno.EPROTOTYPE:
                reason = "the socket is a VMM's or a back-end's; see run --stats-path"
            raise StartError(f"no airlock's stats at {path}: {reason}") from None
    return data.decode(errors="replace")


def _connect(sock: socket.socket, path: str, until: float) -> None:
    """Connect; while the queue of the socket is full, try again until a time."""
    while True:
        try:
            sock.connect(path)
            return
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.02)


def parse(text: str, path: str) -> Document:
    """Return the document in an answer. StartError: it is no airlock's."""
    try:
        return Document.of(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StartError(f"no airlock's stats at {path}: it is another's") from None


def table(document: Document) -> str:
    """Return a table: a column for each ring, a line for each worker and the pool."""
    up = timedelta(seconds=int(document.uptime))
    vmm = "VMM connected" if document.vmm_connected else "no VMM"
    if document.vmm_waits:
        vmm = "VMM connected, another waits" if document.vmm_connected else "VMM waits"
    back = "back-end connected" if document.backend_connected else "no back-end"
    lines = [
        f"{document.name}: {vmm}, {back}",
        f"vhost-airlock {document.version}, up {up}, sessions: {document.sessions}",
    ]

    rings = list(document.rings)
    for start in range(0, len(rings), COLUMNS):
        shown = rings[start : start + COLUMNS]
        counters = [document.counters.get(ring, {}) for ring in shown]
        phases = [document.rings[ring].get("phase") for ring in shown]
        lines += ["", _row("", shown), _row("phase", phases)]
        for name in {name: None for each in counters for name in each}:
            lines.append(_row(name, [each.get(name) for each in counters]))
    lines.append("")
    for group, others in document.counters.items():
        if group not in document.rings:
            said = ", ".join(f"{name} {value:,}" for name, value in others.items())
            lines.append(f"{group}: {said}")
    for ring, condition in document.rings.items():
        if condition.get("fault"):
            lines.append(f"{ring} is broken: {condition['fault']}")
    return "\n".join(lines).rstrip()


def prometheus(document: Document) -> str:
    """Return the text format of Prometheus: a sample for each number, by metric."""
    metrics: dict[str, list[str]] = {
        "info": [f'{{version="{document.version}"}} 1'],
        "uptime_seconds": [f" {document.uptime}"],
        "sessions_total": [f" {document.sessions}"],
        "vmm_connected": [f" {document.vmm_connected:d}"],
        "vmm_waits": [f" {document.vmm_waits:d}"],
        "backend_connected": [f" {document.backend_connected:d}"],
    }
    for ring, condition in document.rings.items():
        broken = int(condition.get("fault") is not None)
        metrics.setdefault("ring_broken", []).append(f"{_label(ring)} {broken}")
    for group, counters in document.counters.items():
        for name, value in counters.items():
            metric = f"{group.split()[0]}_{name}{'' if name in GAUGES else '_total'}"
            metrics.setdefault(metric, []).append(f"{_label(group)} {value}")
    lines = []
    for metric, samples in metrics.items():
        kind = "counter" if metric.endswith("_total") else "gauge"
        lines.append(f"# TYPE vhost_airlock_{metric} {kind}")
        lines += [f"vhost_airlock_{metric}{sample}" for sample in samples]
    return "\n".join(lines)


RATES: tuple[tuple[str, int, Callable[[Rates], str]], ...] = (
    ("requests/s", 11, lambda rates: f"{rates.requests:,.0f}"),
    ("MiB/s in", 9, lambda rates: f"{rates.mib_in:,.1f}"),
    ("MiB/s out", 9, lambda rates: f"{rates.mib_out:,.1f}"),
    ("kicks/req", 9, lambda rates: _ratio(rates.kicks)),
    ("calls/req", 9, lambda rates: _ratio(rates.calls)),
    ("sleeps/s", 9, lambda rates: f"{rates.sleeps:,.0f}"),
    ("polling", 8, lambda rates: f"{rates.polling:.1%}"),
    ("in flight", 9, lambda rates: f"{rates.outstanding:,}"),
)
"""Heading, width and content of each column."""


def rates_line(rates: Rates) -> str:
    return " ".join(f"{form(rates):>{width}}" for _, width, form in RATES)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _row(name: str, values: list[Any]) -> str:
    cells = [f"{x:,}" if isinstance(x, int) else str(x or "-") for x in values]
    return f"{name:12}" + "".join(f"{cell:>18}" for cell in cells)


def _label(group: str) -> str:
    kind, _, number = group.partition(" ")
    return f'{{{kind}="{number}"}}' if number else ""
