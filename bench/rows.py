# SPDX-License-Identifier: Apache-2.0
"""The results of many runs: medians, and ratios of runs that belong together."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.runs import Case, Run
from bench.sure import Ratio, Verdict, overall
from vhost_airlock.cli.bench_report import Spread

OWN, ALL, RATE = "airlock's CPU time", "all CPU time", "rate"
"""The figures that are compared, the steadiest first. CPU time is for a request; `all`
is that of VMM, airlock and back-end."""

FIGURES: Mapping[str, Callable[[Run], float]] = {
    OWN: lambda run: run.cpu_us.get("airlock", 0.0),
    ALL: lambda run: sum(run.cpu_us.values()),
    RATE: lambda run: run.iops,
}


@dataclass(frozen=True)
class Row:
    """The results of all runs of one target under one load: medians."""

    case: Case
    target: str
    runs: int
    iops: Spread
    mb_per_s: float
    p50_us: float
    p99_us: float
    p999_us: float
    cpu_us: Mapping[str, float]
    switches: Mapping[str, tuple[float, float]]
    notices: Mapping[str, float]
    foreign: float
    """Cores that were busy with other programs."""
    ratios: Mapping[str, Ratio]
    """Figures to those of the reference in the same round, by name. The airlock's CPU
    time is missing where the reference is no airlock."""

    @property
    def ratio(self) -> Ratio:
        """The rate to that of the reference."""
        return self.ratios[RATE]


def summarize(runs: Iterable[Run], reference: str) -> list[Row]:
    """One row for each case and target, in the order in which they first came.

    Ratios are paired: each run is compared with the reference's run of the same round,
    next to it in time, so that slow changes of the machine cancel out.
    """
    found: dict[tuple[Case, str], dict[int, Run]] = {}
    for run in runs:
        found.setdefault((run.case, run.target), {})[run.round] = run
    rows = []
    for (case, target), mine in found.items():
        base = found.get((case, reference), {})
        pairs = [(mine[number], base[number]) for number in mine if number in base]
        if pairs:
            rows.append(row_of(case, target, list(mine.values()), pairs))
    return rows


def row_of(
    case: Case, target: str, runs: Sequence[Run], pairs: Sequence[tuple[Run, Run]]
) -> Row:
    """The medians of several runs, and of their ratios to runs of the reference."""
    switches = [run.switches for run in runs]
    return Row(
        case=case,
        target=target,
        runs=len(runs),
        iops=Spread.of(run.iops for run in runs),
        mb_per_s=statistics.median(run.mb_per_s for run in runs),
        p50_us=statistics.median(run.p50_us for run in runs),
        p99_us=statistics.median(run.p99_us for run in runs),
        p999_us=statistics.median(run.p999_us for run in runs),
        cpu_us=medians([run.cpu_us for run in runs]),
        switches={
            name: (
                statistics.median(each[name][0] for each in switches),
                statistics.median(each[name][1] for each in switches),
            )
            for name in switches[0]
        },
        notices=medians([run.notices for run in runs]),
        foreign=statistics.median(run.foreign for run in runs),
        ratios={
            name: Ratio.of_pairs(ratios)
            for name in FIGURES
            if (ratios := paired(pairs, name))
        },
    )


def paired(pairs: Iterable[tuple[Run, Run]], name: str) -> list[float]:
    """The ratios of a figure, of those pairs in which both runs have it."""
    figure = FIGURES[name]
    return [
        figure(mine) / figure(base)
        for mine, base in pairs
        if figure(mine) > 0 and figure(base) > 0
    ]


def means(runs: Iterable[Run], target: str, reference: str) -> dict[str, Ratio]:
    """For each figure, the mean ratio over all cases of a target to the reference."""
    found: dict[Case, dict[str, dict[int, Run]]] = {}
    for run in runs:
        found.setdefault(run.case, {}).setdefault(run.target, {})[run.round] = run
    pairs = [
        [
            (mine, case[reference][number])
            for number, mine in case.get(target, {}).items()
            if number in case.get(reference, {})
        ]
        for case in found.values()
    ]
    ratios = {name: [paired(each, name) for each in pairs] for name in FIGURES}
    return {
        name: overall(present)
        for name, cases in ratios.items()
        if (present := [case for case in cases if case])
    }


def verdict(name: str, ratio: Ratio) -> Verdict:
    """Is a ratio of this figure good? Less time is, and a higher rate."""
    return ratio.verdict(1 if name == RATE else -1)


def medians(all_figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each figure that all of them have."""
    return {
        name: statistics.median(each[name] for each in all_figures)
        for name in all_figures[0]
        if all(name in each for each in all_figures)
    }
