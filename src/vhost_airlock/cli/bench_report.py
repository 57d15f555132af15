# SPDX-License-Identifier: Apache-2.0
"""The results of `vhost-airlock bench`, as a table and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from ..peers.blk_load import LoadPlan, LoadResult

KIB, MIB = 1 << 10, 1 << 20

NAMES = ("device", "compared")
"""Names of the sockets in the table, for their paths may be long."""

HEAD = (
    f"{'load':<18} {'':<9}{'IOPS':>9} {'MB/s':>8} {'p50':>9} {'p99':>9}"
    f" {'p99.9 us':>9} {'CPU us':>8} {'kicks':>7} {'calls':>7}"
)


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some figures, and the lowest and highest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Iterable[float]) -> Spread:
        values = list(figures)
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement: its load, its device, its round, its result."""

    plan: LoadPlan
    path: str
    round: int
    result: LoadResult

    def as_dict(self) -> dict[str, object]:
        plan = asdict(self.plan)
        return {
            "socket": self.path,
            "round": self.round,
            "load": plan,
            **self.result.as_dict(),
        }


def unit(size: int) -> str:
    """A size as people write it."""
    for suffix, bytes in (("M", MIB), ("K", KIB)):
        if size >= bytes and size % bytes == 0:
            return f"{size // bytes}{suffix}"
    return str(size)


def label(plan: LoadPlan) -> str:
    """Return the name of a load in the table."""
    return f"{plan.mode} {unit(plan.size)} x {plan.depth}"


def heading(paths: Sequence[str]) -> str:
    """Return the lines that say which path has which name."""
    lines = [f"{name}: {path}" for name, path in zip(NAMES, paths, strict=False)]
    return "\n".join(lines) + "\n"


def ratios(
    measured: Sequence[Measured], plan: LoadPlan, paths: Sequence[str]
) -> Spread:
    """IOPS of the first device to those of the second, round by round.

    The two runs of a round were measured one after the other, so that slow changes of
    the machine cancel out.
    """
    first, second = (
        {each.round: each.result for each in measured if (each.plan, each.path) == key}
        for key in ((plan, paths[0]), (plan, paths[1]))
    )
    return Spread.of(first[n].iops / second[n].iops for n in first if n in second)


def table(measured: Sequence[Measured], paths: Sequence[str]) -> str:
    """Medians over the rounds: lines for each load."""
    head = HEAD + (f"  {'ratio (lowest-highest)'}" if len(paths) > 1 else "")
    lines = [head]
    for plan in dict.fromkeys(each.plan for each in measured):
        for at, path in enumerate(paths):
            results = [
                each.result
                for each in measured
                if each.plan == plan and each.path == path
            ]
            line = f"{'' if at else label(plan):<18} {NAMES[at]:<9}{figures(results)}"
            if len(paths) > 1 and at == 0:
                line += f"  {ratios(measured, plan, paths)}"
            lines.append(line)
    lines.append("CPU, kicks and calls are ours, for each request.")
    return "\n".join(lines)


def figures(results: Sequence[LoadResult]) -> str:
    """The medians of several results."""

    def median(values: Iterable[float]) -> float:
        return statistics.median(values)

    def latency(share: float) -> float:
        return median(each.percentile_us(share) for each in results)

    return (
        f"{median(each.iops for each in results):>9.0f}"
        f" {median(each.mb_per_s for each in results):>8.0f}"
        f" {latency(0.5):>9.1f} {latency(0.99):>9.1f} {latency(0.999):>9.1f}"
        f" {median(each.cpu_us for each in results):>8.2f}"
        f" {median(each.per_request(each.kicks) for each in results):>7.3f}"
        f" {median(each.per_request(each.calls) for each in results):>7.3f}"
    )
