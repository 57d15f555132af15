# SPDX-License-Identifier: Apache-2.0
"""The state of an airlock for people: a table, or a line of rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

from .stats_document import Document

MIB = 1 << 20
COLUMNS = 4
"""Rings that stand side by side."""


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
RATES_HEADING = " ".join(f"{name:>{width}}" for name, width, _ in RATES)


def rates_line(rates: Rates) -> str:
    return " ".join(f"{form(rates):>{width}}" for _, width, form in RATES)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _row(name: str, values: list[Any]) -> str:
    cells = [f"{x:,}" if isinstance(x, int) else str(x or "-") for x in values]
    return f"{name:12}" + "".join(f"{cell:>18}" for cell in cells)
