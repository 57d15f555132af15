# SPDX-License-Identifier: Apache-2.0
"""The results as one page without other files: an overview first, then all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from bench.extras import ExtraRow
from bench.goals import Goal
from bench.look import (
    HATCHING,
    LOOKS,
    key,
    legend,
    legend_of_parts,
    patterns,
    style_sheet,
)
from bench.rows import Row
from bench.runs import Case
from bench.svg import Series, bars, lines
from bench.table import NOTES, SURE, full_table, heading, others, unsure
from bench.targets import DIRECT, NAMES
from vhost_airlock.cli.bench_report import Spread

AIRLOCK = "airlock"
RATIOS = (
    "The rate to that of the direct connection in the same round, median; higher is"
    " better. 1.00 is as fast as direct, blue is faster, orange slower."
)
MEANING = {
    "direct": "the front-end on the back-end's own socket, nothing between",
    "tuned": "direct, with everything that polling can do: both ends spin",
    "airlock": "through vhost-airlock as it is by default",
    "blocking": "through vhost-airlock with --poll-us 0: it never polls",
    "busy": "through vhost-airlock with --poll-us 1000000: it always polls",
    "nbd": "NBD over a Unix socket: what keeps a process out of guest memory today",
}

MODES = {
    "randread": "Random reads",
    "randwrite": "Random writes",
    "read": "Reads in order",
    "write": "Writes in order",
}


def page(
    machine: Mapping[str, object],
    when: str,
    rows: Sequence[Row],
    goals: Sequence[Goal] = (),
    extras: Sequence[ExtraRow] = (),
) -> str:
    """All results as HTML."""
    parts = [
        "<!doctype html><meta charset=utf-8><title>vhost-airlock: benchmark</title>",
        f"<style>{style_sheet()}</style>{patterns()}",
        "<h1>What an airlock costs</h1>",
        f'<p class="result">{escape(result(rows, goals, extras))}</p>',
        f"<p>{escape(heading(machine))}; {escape(when)}</p>",
    ]
    parts += disk(rows) if rows else []
    if goals:
        parts.append(section("Goals", "The airlock has to meet them under any load."))
        parts.append(goals_table(goals))
    if extras:
        parts.append(section("Network and shared folder", RATIOS))
        parts.append(extras_table(extras))
    if rows:
        parts.append(section("All figures", f"{NOTES}. {others(rows)}."))
        parts.append(f"<pre>{escape(full_table(rows))}</pre>")
    return "\n".join(parts) + "\n"


def result(
    rows: Iterable[Row], goals: Iterable[Goal], extras: Iterable[ExtraRow]
) -> str:
    """One sentence: of the disk, of other devices, or of goals, if there is no disk."""
    for device, measured in (("a disk", rows), ("another device", extras)):
        found = [each.ratio.median for each in measured if each.target == AIRLOCK]
        if found:
            return (
                f"Through the airlock, {device} has {statistics.median(found):.2f} of"
                f" the rate of a direct connection: the median of {len(found)} loads,"
                f" {min(found):.2f} in the slowest and {max(found):.2f} in the fastest."
            )
    wanted = [goal for goal in goals if goal.wanted]
    met = sum(goal.met for goal in wanted)
    return f"The airlock meets {met} of {len(wanted)} goals."


def disk(rows: Sequence[Row]) -> list[str]:
    """The block device: at a glance, then rates, latencies and CPU time."""
    names = [name for name in NAMES if any(row.target == name for row in rows)]
    return [
        tiles(rows, names),
        section("Rate, relative to direct", f"{RATIOS} {SURE}."),
        heat_tables(rows, names),
        section(
            "Rate",
            "Requests a second, by requests in flight. A point is the median of the"
            " rounds, and its bar goes from the lowest to the highest.",
        ),
        legend(names),
        charts(rows, names, "requests a second", "higher", lambda row: row.iops),
        section(
            "Latency",
            "On a scale of decades: half of all requests took no longer than"
            " the point, and 99 of 100 no longer than the end of its bar.",
        ),
        legend(names),
        charts(
            rows,
            names,
            "us",
            "lower",
            lambda row: Spread(row.p50_us, row.p50_us, row.p99_us),
            decades=True,
        ),
        section(
            "CPU time",
            "For each request, polling included: the front-end's, the airlock's and the"
            " back-end's.",
        ),
        legend_of_parts(),
        cpu_charts(rows),
    ]


def goals_table(goals: Iterable[Goal]) -> str:
    lines = [
        f"<tr><td>{escape(goal.name)}<td>{escape(goal.found)}<td>{escape(goal.wanted)}"
        + ("" if goal.met else " <b>not met</b>")
        for goal in goals
    ]
    head = "<tr><th><th>found<th>wanted"
    return f'<table class="goals">{head}{"".join(lines)}</table>'


def extras_table(extras: Sequence[ExtraRow]) -> str:
    names = [name for name in NAMES if any(row.target == name for row in extras)]
    found: dict[str, dict[str, Cell]] = {}
    for row in extras:
        figure = f"{row.value.median:.2f} {row.unit}"
        found.setdefault(row.case, {})[row.target] = Cell(row.ratio, figure)
    return heat_table("", found, names)


def section(title: str, explanation: str) -> str:
    return f"<h2>{escape(title)}</h2><p>{escape(explanation)}</p>"


def tiles(rows: Sequence[Row], names: Iterable[str]) -> str:
    """For each target, the median of its ratios over all cases."""
    found = []
    for name in names:
        ratios = [row.ratio.median for row in rows if row.target == name]
        if name == DIRECT:
            big, small = "1.00", MEANING[name]
        else:
            big = f"{statistics.median(ratios):.2f}"
            small = (
                f"{MEANING[name]}. Median of {len(ratios)} loads,"
                f" {min(ratios):.2f} to {max(ratios):.2f}"
            )
        found.append(
            f'<div class="tile">{key(name)}{name}'
            f"<b>{big}</b><small>{escape(small)}</small></div>"
        )
    return f'<div class="tiles">{"".join(found)}</div>'


def heat_tables(rows: Sequence[Row], names: Sequence[str]) -> str:
    """A table for each kind of access."""
    found: dict[str, dict[str, dict[str, Cell]]] = {}
    for row in rows:
        figure = f"{row.iops.median:,.0f} IOPS"
        cell = Cell(row.ratio, figure, unsure(row))
        cases = found.setdefault(row.case.mode, {})
        cases.setdefault(str(row.case), {})[row.target] = cell
    tables = [heat_table(MODES[mode], cases, names) for mode, cases in found.items()]
    return f'<div class="tables">{"".join(tables)}</div>'


@dataclass(frozen=True)
class Cell:
    """A ratio, the figure that it comes from, and a mark if it isn't sure."""

    ratio: Spread
    figure: str
    mark: str = ""


def heat_table(
    title: str, cases: Mapping[str, Mapping[str, Cell]], names: Iterable[str]
) -> str:
    """A line for each case, a coloured cell for each target."""
    shown = [name for name in names if name != DIRECT]
    head = "".join(f"<th>{key(name)}{name}" for name in shown)
    found = [f"<tr><th>load<th>direct{head}</tr>"]
    for case, mine in cases.items():
        direct = mine[DIRECT].figure if DIRECT in mine else ""
        cells = [f"<td>{escape(case)}", f"<td>{escape(direct)}"]
        for name in shown:
            cell = mine.get(name)
            if cell is None:
                cells.append("<td>")
                continue
            cells.append(
                f'<td style="background:{shade(cell.ratio.median)}"'
                f' title="{cell.figure}, ratio {cell.ratio}">'
                f"{cell.ratio.median:.2f}{cell.mark}"
            )
        found.append(f"<tr>{''.join(cells)}</tr>")
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f"<div>{heading}<table>{''.join(found)}</table></div>"


def by_case(rows: Iterable[Row]) -> dict[Case, dict[str, Row]]:
    found: dict[Case, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.case, {})[row.target] = row
    return found


def shade(ratio: float) -> str:
    """Return a colour: orange below 1, blue above, stronger with the distance."""
    distance = max(-2.0, min(2.0, math.log2(ratio))) if ratio > 0 else -2.0
    colour = "slow" if distance < 0 else "fast"
    return f"color-mix(in srgb,var(--{colour}) {50 * abs(distance):.0f}%,var(--page))"


def charts(
    rows: Sequence[Row],
    names: Sequence[str],
    unit: str,
    better: str,
    figure: Callable[[Row], Spread],
    *,
    decades: bool = False,
) -> str:
    """A chart for each kind of case that has several depths; a line for each mode."""
    found = []
    for kind, cases in kinds(rows).items():
        depths = sorted({case.depth for case in cases})
        if len(depths) < 2:
            continue
        series = []
        for name in names:
            mine = {
                row.case.depth: row
                for row in rows
                if row.target == name and row.case.kind == kind
            }
            values = [figure(mine[d]) if d in mine else None for d in depths]
            series.append(Series(name, LOOKS[name].mark, values))
        steps = [f"depth {depth}" for depth in depths]
        found.append(lines(kind, steps, series, unit, better, decades=decades))
    return f'<div class="charts">{"".join(found)}</div>'


def kinds(rows: Iterable[Row]) -> dict[str, set[Case]]:
    found: dict[str, set[Case]] = {}
    for row in rows:
        found.setdefault(row.case.kind, set()).add(row.case)
    return found


def cpu_charts(rows: Iterable[Row]) -> str:
    """Stacked bars for each case: the CPU time of each process."""
    found = [
        bars(
            str(case),
            [
                (
                    name,
                    {part: row.cpu_us[part] for part in HATCHING if part in row.cpu_us},
                )
                for name, row in mine.items()
            ],
            "us a request",
            "lower",
        )
        for case, mine in by_case(rows).items()
    ]
    return f'<div class="charts">{"".join(found)}</div>'
