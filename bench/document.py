# SPDX-License-Identifier: Apache-2.0
"""The figures of docs/benchmark-tables.md, between marks that name their part."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from bench.extras import ExtraRow
from bench.goals import Goal
from bench.rows import Row
from bench.runs import BenchError
from bench.table import SURE, amount, axes, heading, others, unsure
from bench.targets import DIRECT
from tests.real.programs import PROJECT

DOCUMENT = PROJECT / "docs" / "benchmark-tables.md"
POLLED = ", idle cores poll"
"""Ends the names of parts that were measured so."""


def parts(
    machine: Mapping[str, object],
    when: str,
    rows: Sequence[Row],
    targets: Sequence[str],
    goals: Sequence[Goal],
    extras: Sequence[ExtraRow],
) -> Iterator[tuple[str, str]]:
    """Return the parts that were measured, and their text."""
    where = f"{heading(machine)}, {when}."
    if rows:
        sure = f"{SURE}. {others(rows)}."
        yield "disk", f"{where} {sure}\n\n{of_disk(rows, targets)}"
    if goals:
        yield "goals", f"{where}\n\n{of_goals(goals)}"
    if extras:
        yield "devices", f"{where}\n\n{of_devices(extras)}"


def of_disk(rows: Sequence[Row], targets: Sequence[str]) -> str:
    """Ratios of each target, then the airlock's own CPU time."""
    found = []
    for target in targets:
        depths, kinds = axes(rows, target)
        if kinds:
            head = [f"{target} / direct", *(f"depth {depth}" for depth in depths)]
            lines = [
                [kind, *(ratio(mine.get(depth)) for depth in depths)]
                for kind, mine in kinds.items()
            ]
            found.append(grid(head, lines))
    found.append("CPU time of the airlock itself, in us for each request:")
    depths, _ = axes(rows, DIRECT)
    lines = [
        [f"{kind}, {target}", *(own_cpu(mine.get(depth)) for depth in depths)]
        for target in targets
        for kind, mine in axes(rows, target)[1].items()
        if any("airlock" in row.cpu_us for row in mine.values())
    ]
    found.append(grid(["", *(f"depth {depth}" for depth in depths)], lines))
    return "\n\n".join(found)


def of_goals(goals: Iterable[Goal]) -> str:
    lines = [
        [goal.name, goal.found, goal.wanted + ("" if goal.met else ": **not met**")]
        for goal in goals
    ]
    return grid(["", "found", "wanted"], lines)


def of_devices(extras: Iterable[ExtraRow]) -> str:
    lines = [
        [
            row.case,
            row.target,
            f"{row.value.median:.2f} {row.unit}",
            str(row.ratio),
            "" if row.airlock_cores is None else f"{row.airlock_cores:.2f}",
        ]
        for row in extras
    ]
    return grid(["", "target", "rate", "ratio", "cores that the airlock uses"], lines)


def ratio(row: Row | None) -> str:
    return "" if row is None else f"{row.ratio}{unsure(row)}"


def own_cpu(row: Row | None) -> str:
    return "" if row is None else amount(row.cpu_us.get("airlock"))


def grid(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table as Markdown has it."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def update(name: str, text: str, path: Path = DOCUMENT) -> None:
    """Replace the text between the marks of a part."""
    path.write_text(replaced(path.read_text(), name, text))


def replaced(content: str, name: str, text: str) -> str:
    """Return a document with another text between the marks of a part."""
    begin, end = f"<!-- {name}: made by make bench -->", f"<!-- end of {name} -->"
    pattern = re.compile(rf"{re.escape(begin)}\n.*?{re.escape(end)}", re.S)
    if not pattern.search(content):
        raise BenchError(f"the document has no place for {name}")
    return pattern.sub(lambda _: f"{begin}\n\n{text.strip()}\n\n{end}", content)
