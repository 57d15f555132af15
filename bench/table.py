# SPDX-License-Identifier: Apache-2.0
"""The results as text: for a terminal, and for the document."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from bench.rows import FIGURES, Row, verdict
from bench.runs import Case
from bench.sure import ENOUGH, LEVEL, Ratio

HEAD = (
    f"{'case':<32}{'target':<10}{'IOPS':>8} {'MB/s':>7} {'p50 us':>8} {'p99':>8}"
    f" {'p99.9':>8} | {'CPU us: front':>13} {'airlock':>8} {'back':>8}"
    f" | {'kicks':>12} {'calls':>12} {'switches':>8}"
)
SURE = (
    f"In brackets: the {LEVEL:.0%} confidence interval of the median. A question mark:"
    " it can't be told on which side of 1 the ratio lies"
)
NOTES = (
    "For each request: kicks of front/airlock, calls to front by back or airlock,"
    " context switches of all processes"
)


def report(
    rows: Sequence[Row],
    reference: str,
    targets: Iterable[str],
    means: Mapping[str, Mapping[str, Ratio]],
) -> str:
    """Every figure, then the ratios of targets to the reference; `means` are over all
    cases, by target.
    """
    parts = [full_table(rows), NOTES]
    for name in targets:
        mine = [row for row in rows if row.target == name]
        title = f"{name} / {reference}"
        parts.append(verdict_table(title, mine, means.get(name, {})))
    return "\n\n".join([*parts, others(rows)])


def verdict_table(title: str, rows: Sequence[Row], means: Mapping[str, Ratio]) -> str:
    """The ratios of one target in each case and over all, with their verdicts."""
    names = [name for name in FIGURES if any(name in row.ratios for row in rows)]
    lines = [(title, {name: name for name in names})]
    lines += [(str(row.case), said(row.ratios)) for row in rows]
    lines.append(("geometric mean", said(means)))
    return "\n".join(
        f"{case:<32}" + "".join(f"{texts.get(name, ''):<36}" for name in names).rstrip()
        for case, texts in lines
    )


def said(ratios: Mapping[str, Ratio]) -> dict[str, str]:
    return {name: f"{ratio}  {verdict(name, ratio)}" for name, ratio in ratios.items()}


def others(rows: Sequence[Row]) -> str:
    """How much the machine had to do besides, and how many pairs of runs there are."""
    cores = [row.foreign for row in rows]
    pairs = min(row.ratio.pairs for row in rows)
    few = f", fewer than the {ENOUGH} that a verdict needs" if pairs < ENOUGH else ""
    return (
        f"Other programs kept {statistics.median(cores):.2f} cores busy meanwhile,"
        f" {max(cores):.2f} at most; {pairs} pairs of runs{few}"
    )


def full_table(rows: Iterable[Row]) -> str:
    """A line for each case and target, with empty lines between cases."""
    lines = [HEAD]
    last: Case | None = None
    for row in rows:
        if row.case != last:
            lines.append("")
        lines.append(line(row, "" if row.case == last else str(row.case)))
        last = row.case
    return "\n".join(lines)


def line(row: Row, name: str) -> str:
    cpu, sent = row.cpu_us, row.notices
    kicks = f"{amount(sent.get('front kicks'))}/{amount(sent.get('airlock kicks'))}"
    calls = amount(sent.get("airlock calls", sent.get("front calls")))
    switches = sum(sum(pair) for pair in row.switches.values())
    return (
        f"{name:<32}{row.target:<10}{row.iops.median:>8.0f} {row.mb_per_s:>7.0f}"
        f" {row.p50_us:>8.1f} {row.p99_us:>8.1f} {row.p999_us:>8.1f}"
        f" | {cpu['front']:>13.2f} {amount(cpu.get('airlock')):>8}"
        f" {amount(cpu.get('back')):>8}"
        f" | {kicks:>12} {calls:>12} {switches:>8.2f}"
    )


def amount(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def axes(
    rows: Iterable[Row], target: str
) -> tuple[list[int], dict[str, dict[int, Row]]]:
    """The depths of a target's rows, and its rows by kind of case and by depth."""
    mine = [row for row in rows if row.target == target]
    kinds: dict[str, dict[int, Row]] = {}
    for row in mine:
        kinds.setdefault(row.case.kind, {})[row.case.depth] = row
    return sorted({row.case.depth for row in mine}), kinds


def unsure(row: Row) -> str:
    """A mark if it can't be told whether the rate is above or below the reference's."""
    return "" if row.ratio.side else "?"


def heading(machine: Mapping[str, object]) -> str:
    """One line about machine and programs."""
    kind = "virtual cores" if machine["virtual"] else "cores"
    if (us := machine["idle_poll_us"]) is not None:
        kind += " that halt at once" if us == 0 else f" that poll {us} us when idle"
    return (
        f"{machine['cpu']}, {machine['cores']} {kind}, kernel {machine['kernel']},"
        f" qemu-storage-daemon {machine['qemu-storage-daemon']},"
        f" libblkio {machine['libblkio']},"
        f" vhost-airlock {machine['vhost-airlock']} ({machine['commit']})"
    )
