# SPDX-License-Identifier: Apache-2.0
"""The results as one page without other files: an overview first, then all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from bench.extras import ExtraRow
from bench.goals import Goal
from bench.runs import Case, Row
from bench.svg import Series, bars, lines
from bench.table import NOTES, STAR, full_table, heading
from bench.targets import DIRECT, NAMES
from vhost_airlock.cli.bench_report import Spread

COLOURS = dict(
    zip(
        NAMES,
        ("#4b5563", "#9ca3af", "#0072b2", "#56b4e9", "#009e73", "#d55e00"),
        strict=True,
    )
)
PARTS = {"front": "#9ca3af", "airlock": "#0072b2", "back": "#4b5563"}
MEANING = {
    "direct": "the front-end on the back-end's own socket, nothing between",
    "tuned": "direct, with everything that polling can do: both ends spin",
    "airlock": "through vhost-airlock as it is by default",
    "blocking": "through vhost-airlock with --poll-us 0: it never polls",
    "busy": "through vhost-airlock with --poll-us 1000000: it always polls",
    "nbd": "NBD over a Unix socket: what keeps a process out of guest memory today",
}

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1f2937; max-width: 1240px;
       margin: 32px auto; padding: 0 24px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 19px; margin: 36px 0 6px; }
p { margin: 4px 0 10px; color: #4b5563; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0 6px; }
.tile { border: 1px solid #d1d5db; border-left: 6px solid; border-radius: 6px;
        padding: 8px 10px; width: 156px; }
.tile b { font-size: 26px; display: block; } .tile small { color: #4b5563; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; padding: 3px 10px; }
th:first-child, td:first-child { text-align: left; }
td { text-align: right; padding: 3px 10px; border: 1px solid #fff; }
.charts { display: flex; flex-wrap: wrap; gap: 10px 18px; }
.legend span { display: inline-block; margin-right: 18px; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px;
            margin-right: 6px; vertical-align: -1px; }
svg text { font: 11.5px system-ui, sans-serif; fill: #4b5563; }
svg .title { font-weight: 600; font-size: 13px; fill: #1f2937; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .grid { stroke: #e5e7eb; } svg polyline { fill: none; stroke-width: 2; }
svg .spread { stroke-width: 1.5; opacity: .55; fill: none; }
pre { overflow-x: auto; font-size: 12px; background: #f9fafb; padding: 12px; }
.warning { background: #fef3c7; padding: 8px 14px; border-radius: 6px; }
"""


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
        f"<style>{STYLE}</style>",
        "<h1>What an airlock costs</h1>",
        f"<p>{escape(heading(machine))}; {escape(when)}</p>",
    ]
    parts += disk(rows) if rows else []
    if goals:
        parts += [section("Goals", "Whatever the load."), goals_table(goals)]
    if extras:
        parts += [section("Other devices", "As they see it."), extras_table(extras)]
    if rows:
        parts.append(section("All figures", NOTES + ". " + STAR + "."))
        parts.append(f"<pre>{escape(full_table(rows))}</pre>")
    return "\n".join(parts) + "\n"


def disk(rows: Sequence[Row]) -> list[str]:
    """The block device: at a glance, then rates, latencies and CPU time."""
    names = [name for name in NAMES if any(row.target == name for row in rows)]
    return [
        warning(sum(bool(row.disturbed) for row in rows), len(rows)),
        tiles(rows, names),
        section(
            "Rate, relative to direct",
            "IOPS to those of the direct connection in the same round, median. 1.00 is"
            " as fast, blue is faster, orange slower.",
        ),
        heat_table(rows, names),
        section(
            "Rate", "Requests in a second, by requests in flight. Higher is better."
        ),
        legend({name: COLOURS[name] for name in names}),
        charts(rows, names, "requests a second", lambda row: row.iops),
        section(
            "Latency",
            "In us, on a scale of decades: half of all requests took no longer than"
            " the point, and 99 of 100 no longer than the end of its bar. Lower is"
            " better.",
        ),
        charts(
            rows,
            names,
            "us",
            lambda row: Spread(row.p50_us, row.p50_us, row.p99_us),
            decades=True,
        ),
        section(
            "CPU time", "For each request, in us, polling included. Lower is better."
        ),
        legend(PARTS),
        cpu_charts(rows),
    ]


def goals_table(goals: Iterable[Goal]) -> str:
    lines = [
        f"<tr><td>{escape(goal.name)}<td>{escape(goal.found)}<td>{escape(goal.wanted)}"
        + ("" if goal.met else " <b>not met</b>")
        for goal in goals
    ]
    return f"<table><tr><th><th>found<th>wanted{''.join(lines)}</table>"


def extras_table(extras: Iterable[ExtraRow]) -> str:
    lines = [
        f"<tr><td>{escape(row.case)}<td>{row.target}"
        f"<td>{row.value.median:.2f} {row.unit}"
        f'<td style="background:{shade(row.ratio.median)}">{row.ratio}'
        for row in extras
    ]
    head = "<tr><th><th>target<th>rate<th>to direct"
    return f"<table>{head}{''.join(lines)}</table>"


def warning(disturbed: int, total: int) -> str:
    if not disturbed:
        return ""
    return (
        f'<p class="warning">Other programs kept the machine busy during {disturbed}'
        f" of {total} rows: their figures, marked by a star, are not to be trusted.</p>"
    )


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
            f'<div class="tile" style="border-left-color:{COLOURS[name]}">{name}'
            f"<b>{big}</b><small>{escape(small)}</small></div>"
        )
    return f'<div class="tiles">{"".join(found)}</div>'


def heat_table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """A line for each case, a coloured cell for each target."""
    shown = [name for name in names if name != DIRECT]
    head = "".join(f"<th>{name}</th>" for name in shown)
    found = [f"<tr><th>load<th>direct, IOPS{head}</tr>"]
    for case, mine in by_case(rows).items():
        cells = [f"<td>{case}", f"<td>{mine[DIRECT].iops.median:,.0f}"]
        for name in shown:
            row = mine.get(name)
            if row is None:
                cells.append("<td>")
                continue
            star = "*" if row.disturbed else ""
            cells.append(
                f'<td style="background:{shade(row.ratio.median)}"'
                f' title="{row.iops.median:,.0f} IOPS, ratio {row.ratio}">'
                f"{row.ratio.median:.2f}{star}"
            )
        found.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(found)}</table>"


def by_case(rows: Iterable[Row]) -> dict[Case, dict[str, Row]]:
    found: dict[Case, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.case, {})[row.target] = row
    return found


def shade(ratio: float) -> str:
    """Return a colour: orange below 1, blue above, darker with the distance."""
    distance = max(-2.0, min(2.0, math.log2(ratio))) if ratio > 0 else -2.0
    hue = 24 if distance < 0 else 205
    return f"hsl({hue} 85% {100 - 19 * abs(distance):.0f}%)"


def charts(
    rows: Sequence[Row],
    names: Sequence[str],
    unit: str,
    figure: Callable[[Row], Spread],
    *,
    decades: bool = False,
) -> str:
    """A chart for each kind of case that has several depths; a line for each mode."""
    found: dict[str, list[str]] = {}
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
            series.append(Series(name, COLOURS[name], values))
        steps = [f"depth {depth}" for depth in depths]
        chart = lines(kind, steps, series, unit, decades=decades)
        found.setdefault(kind.partition("-")[0], []).append(chart)
    return "".join(
        f'<div class="charts">{"".join(each)}</div>' for each in found.values()
    )


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
                (name, {part: row.cpu_us[part] for part in PARTS if part in row.cpu_us})
                for name, row in mine.items()
            ],
            PARTS,
        )
        for case, mine in by_case(rows).items()
    ]
    return f'<div class="charts">{"".join(found)}</div>'


def legend(colours: Mapping[str, str]) -> str:
    marks = "".join(
        f'<span><i style="background:{colour}"></i>{name}</span>'
        for name, colour in colours.items()
    )
    return f'<p class="legend">{marks}</p>'
