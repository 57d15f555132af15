# SPDX-License-Identifier: Apache-2.0
"""The results of the demo, as text and as JSON."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..peers.disk import BlkType
from ..peers.ram import MIB
from ..peers.scan import Found, Holding, Scan
from ..peers.workload import Result

REDRAW = 0.1
"""Seconds between two states of the progress display."""


@dataclass(frozen=True, slots=True)
class Proof:
    """The markers in the back-end's process, behind the airlock and without it."""

    marker: bytes
    """The marker in guest memory, in places that no request is about."""
    written: bytes
    """The marker that the guest wrote to the disk."""
    planted: int
    """The number of places of guest memory in which `marker` stands."""
    direct: Scan
    isolated: Scan
    holds: Sequence[Holding]
    """All descriptors and mappings of the back-end behind the airlock."""

    @property
    def blind(self) -> list[Holding]:
        """Memory that could not be searched behind the airlock, except the kernel's."""
        return [each for each in self.isolated.unreadable if each.name[:2] != "[v"]

    @property
    def ok(self) -> bool:
        return (
            len(finds(self.direct, self.marker)) >= self.planted
            and bool(finds(self.isolated, self.written))
            and not finds(self.isolated, self.marker)
            and not self.blind
        )


def finds(scan: Scan, marker: bytes) -> list[Found]:
    return [found for found in scan.found if found.marker == marker]


@dataclass(slots=True)
class Report:
    """All results of the demo; a part that it did not reach is empty."""

    written: list[Result] = field(default_factory=list)
    read: list[Result] = field(default_factory=list)
    counters: dict[str, dict[str, int]] = field(default_factory=dict)
    proof: Proof | None = None
    seconds: float = 0.0
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and self.proof is not None and self.proof.ok

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "error": self.error,
            "seconds": round(self.seconds, 3),
            "written": _summary(self.written),
            "read": _summary(self.read),
            "counters": self.counters,
            "proof": _proof(self.proof) if self.proof else None,
        }


def _summary(results: Sequence[Result]) -> dict[str, Any]:
    size = sum(result.stage.total for result in results)
    seconds = sum(result.seconds for result in results)
    return {
        "bytes": size,
        "requests": sum(result.requests for result in results),
        "mib_per_second": round(size / MIB / seconds, 1) if results else 0,
        "stages": [
            {
                "size": result.stage.size,
                "depth": result.stage.depth,
                "bytes": result.stage.total,
                "seconds": round(result.seconds, 4),
            }
            for result in results
        ],
    }


def _proof(proof: Proof) -> dict[str, Any]:
    return {
        "ok": proof.ok,
        "planted": proof.planted,
        "direct": _scan(proof, proof.direct),
        "airlock": _scan(proof, proof.isolated),
        "not_searched": [str(holding) for holding in proof.blind],
        "back_end_holds": [str(holding) for holding in proof.holds],
    }


def _scan(proof: Proof, scan: Scan) -> dict[str, Any]:
    def places(marker: bytes) -> list[str]:
        return [f"{found.holding} at {found.at:#x}" for found in finds(scan, marker)]

    return {
        "searched_bytes": scan.searched,
        "guest_memory_marker": places(proof.marker),
        "written_marker": places(proof.written),
    }


class Display:
    """Prints lines, and on a terminal the progress of the step that is under way.

    When silent, it prints no lines, and the progress goes to stderr.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._terminal = sys.stderr if silent else sys.stdout
        self._live = self._terminal.isatty()
        self._shown = False
        self._next = 0.0

    def progress(self, text: str, part: float | None = None) -> None:
        """Show the step and its done part; at most once in REDRAW, to save time."""
        now = time.monotonic()
        if not self._live or (part is not None and now < self._next):
            return
        self._next = now + REDRAW
        width = min(shutil.get_terminal_size().columns, 80) - 1
        if part is not None:
            room = max(10, width - len(text) - 5)
            done = int(room * part)
            text = f"  [{'#' * done}{'.' * (room - done)}] {text}"
        print(f"\r{text[:width]}\x1b[K", end="", file=self._terminal, flush=True)
        self._shown = True

    def clear(self) -> None:
        """Remove the line of progress()."""
        if self._shown:
            print("\r\x1b[K", end="", file=self._terminal, flush=True)
            self._shown = False

    def line(self, text: str = "") -> None:
        if not self._silent:
            self.clear()
            print(text, flush=True)

    def result(self, result: Result) -> None:
        """Print the rates of a stage."""
        self.line(
            f"  {result.stage!s:>12}  {result.stage.total // MIB:3} MiB"
            f"  {result.mib_per_second:6,.0f} MiB/s"
            f"  {result.requests / result.seconds:7,.0f} requests/s"
        )

    def conclude(self, report: Report) -> None:
        """Print all results, at the end."""
        self._throughput(report)
        self._counters(report)
        if report.proof:
            self._proof(report.proof)
            self._holds(report.proof)
        self.line()
        verdict = "PASSED" if report.ok else "FAILED"
        self.line(f"{verdict} in {report.seconds:.1f} s")

    def _throughput(self, report: Report) -> None:
        for kind, results in (
            (BlkType.OUT, report.written),
            (BlkType.IN, report.read),
        ):
            total = _summary(results)
            self.line(
                f"{'Written' if kind == BlkType.OUT else 'Read and verified'}:"
                f" {total['bytes'] // MIB} MiB in {total['requests']:,} requests,"
                f" {total['mib_per_second']:,.0f} MiB/s"
            )
        self.line("(The guest and the back-end are plain Python, which sets the pace.)")

    def _counters(self, report: Report) -> None:
        """Print a column for each ring, and a line for each worker and the pool."""
        rings = {k: v for k, v in report.counters.items() if k.startswith("ring ")}
        self.line()
        self.line(f"{'The airlock counted:':22}{''.join(map('{:>15}'.format, rings))}")
        for name in {name: None for counters in rings.values() for name in counters}:
            values = (f"{counters.get(name, 0):15,}" for counters in rings.values())
            self.line(f"  {name:20}{''.join(values)}")
        for group, counters in report.counters.items():
            if group not in rings:
                shown = ", ".join(f"{key} {value:,}" for key, value in counters.items())
                self.line(f"  {group}: {shown}")

    def _proof(self, proof: Proof) -> None:
        self.line()
        self.line(
            f"A random marker stands in {proof.planted} places of guest memory that no"
            " request is about."
        )
        self.line("Does the back-end's process hold it?")
        for name, scan in (
            ("connected directly", proof.direct),
            ("through the airlock", proof.isolated),
        ):
            found = finds(scan, proof.marker)
            answer = f"YES, found {len(found)} times" if found else "no, not found"
            self.line(f"  {name}: {answer} ({scan.searched // MIB} MiB searched)")
            for each in found:
                held = each.holding
                self.line(f"    {held.kind} {held.place}  {held.name} at {each.at:#x}")
        found = finds(proof.isolated, proof.written)
        self.line(
            "  (A marker that the guest wrote to the disk is found"
            f" {len(found)} times, so the search works.)"
        )
        for holding in proof.blind:
            self.line(f"  could not be searched: {holding}")

    def _holds(self, proof: Proof) -> None:
        self.line()
        self.line("Behind the airlock, this is all that the back-end's process holds:")
        shared = [each for each in proof.holds if each.shared]
        for each in shared:
            if each.size:
                self.line(f"  {each.kind} {each.place}  {each.name}, {_size(each)}")
        rest = [each for each in shared if not each.size]
        for name in {each.name: None for each in rest}:
            numbers = " ".join(each.place for each in rest if each.name == name)
            self.line(f"  fd {numbers}  {name}")
        private = [each for each in proof.holds if not each.shared]
        self.line(
            f"  {len(private)} private mappings of its program, libraries and heap"
            f" ({sum(each.size for each in private) // MIB} MiB)"
        )


def _size(holding: Holding) -> str:
    whole, rest = divmod(holding.size, MIB)
    return f"{holding.size:,} bytes" if rest else f"{whole} MiB"
