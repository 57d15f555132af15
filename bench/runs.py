"""What is measured, and what a number of runs says: plain data and statistics."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KIB, MIB = 1 << 10, 1 << 20

WARMED = 0.1
"""Share of a run's time, at either end, that is not used to measure CPU."""


class BenchError(Exception):
    """Nothing can be measured here."""


@dataclass(frozen=True, order=True)
class Case:
    """A load that every target gets."""

    mode: str
    """A mode of the load program."""
    size: int
    """Bytes of a request."""
    depth: int
    """Requests in flight."""

    @property
    def unit(self) -> str:
        """The size as people write it."""
        return f"{self.size // MIB}M" if self.size >= MIB else f"{self.size // KIB}K"

    def __str__(self) -> str:
        return f"{self.mode}-{self.unit}-{self.depth}"


@dataclass(frozen=True)
class Sample:
    """CPU time up to a moment. All in nanoseconds."""

    at: int
    """CLOCK_MONOTONIC."""
    cpu: Mapping[str, int]
    """By name of the process."""
    machine: int
    """Of everything on the machine, all cores together."""


@dataclass(frozen=True)
class Run:
    """One target under one load, once."""

    case: Case
    target: str
    round: int
    iops: float
    mb_per_s: float
    p50_us: float
    p99_us: float
    cpu_us: Mapping[str, float]
    """CPU time for a request, by name of the process."""
    foreign: float
    """Cores that were busy with something else."""
    disturbed: bool
    """That was too much, each time that it was tried."""


@dataclass(frozen=True)
class Spread:
    """The median of some figures, and the lowest and highest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Iterable[float]) -> Spread:
        values = list(figures)
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """What all runs of one target under one load say."""

    case: Case
    target: str
    runs: int
    disturbed: int
    iops: Spread
    mb_per_s: float
    p50_us: float
    p99_us: float
    cpu_us: Mapping[str, float]
    ratio: Spread
    """IOPS to those of the first target in the same round."""


def steady(samples: Sequence[Sample], end: int, length: int) -> tuple[Sample, Sample]:
    """Return the samples next to begin and end of the time that counts.

    `length` is how long the load was measured and `end` when its program was gone: it
    had connected and warmed up before, and disconnected after.
    """
    margin = int(length * WARMED)
    begin, end = end - length + margin, end - margin
    first = min(samples, key=lambda sample: abs(sample.at - begin))
    last = min(samples, key=lambda sample: abs(sample.at - end))
    if first.at >= last.at:
        raise BenchError(f"{len(samples)} samples in a run: too busy to measure")
    return first, last


def make_run(
    case: Case,
    target: str,
    number: int,
    said: Mapping[str, Any],
    first: Sample,
    last: Sample,
    bound: float,
) -> Run:
    """Put together what the load program said and what was seen from outside.

    CPU time for a request comes from rates: what the processes used in a second by the
    requests in a second. So it needs no count at the moment of either sample.
    """
    seconds = (last.at - first.at) / 1e9
    cores = {
        name: (last.cpu[name] - first.cpu[name]) / 1e9 / seconds for name in last.cpu
    }
    foreign = (last.machine - first.machine) / 1e9 / seconds - sum(cores.values())
    iops = float(said["iops"])
    return Run(
        case=case,
        target=target,
        round=number,
        iops=iops,
        mb_per_s=float(said["mb_per_s"]),
        p50_us=float(said["latency_us"]["p50"]),
        p99_us=float(said["latency_us"]["p99"]),
        cpu_us={name: used * 1e6 / iops for name, used in cores.items()},
        foreign=foreign,
        disturbed=foreign > bound,
    )


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
        paired = [mine[n].iops / base[n].iops for n in mine if n in base]
        if not paired:
            continue
        rows.append(
            Row(
                case=case,
                target=target,
                runs=len(mine),
                disturbed=sum(run.disturbed for run in mine.values()),
                iops=Spread.of(run.iops for run in mine.values()),
                mb_per_s=statistics.median(run.mb_per_s for run in mine.values()),
                p50_us=statistics.median(run.p50_us for run in mine.values()),
                p99_us=statistics.median(run.p99_us for run in mine.values()),
                cpu_us={
                    name: statistics.median(run.cpu_us[name] for run in mine.values())
                    for name in next(iter(mine.values())).cpu_us
                },
                ratio=Spread.of(paired),
            )
        )
    return rows
