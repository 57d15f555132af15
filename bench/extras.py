# SPDX-License-Identifier: Apache-2.0
"""Devices other than disks: the figures of their own programs on a target."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.machine import Watched, wait_for_quiet
from bench.targets import AIRLOCKS, DIRECT
from tests.real.airlock import airlock
from vhost_airlock.cli.bench_report import Spread

MOMENT = 5.0
"""Seconds to wait for a quiet machine, before each run."""

Measure = Callable[[str], Mapping[str, "Figure"]]
"""Measures once, on the target of that name: figures by case."""


@dataclass(frozen=True)
class Figure:
    """The result of a case."""

    value: float
    unit: str
    airlock_cores: float | None = None
    """Cores that the airlock used."""


@dataclass(frozen=True)
class ExtraRow:
    """The results of all runs of a case on a target."""

    case: str
    target: str
    unit: str
    value: Spread
    ratio: Spread
    """The ratio to the direct connection in the same round."""
    airlock_cores: float | None


def in_rounds(names: Sequence[str], rounds: int, measure: Measure) -> list[ExtraRow]:
    """Measure all targets in each round, beginning with another one each time."""
    found: dict[tuple[str, str], list[Figure]] = {}
    for number in range(rounds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            wait_for_quiet(MOMENT)
            for case, figure in measure(name).items():
                found.setdefault((case, name), []).append(figure)
    return [
        row_of(case, name, figures, found[case, DIRECT])
        for case in dict.fromkeys(case for case, _ in found)
        for name in names
        if (figures := found.get((case, name)))
    ]


def row_of(
    case: str, name: str, mine: Sequence[Figure], direct: Sequence[Figure]
) -> ExtraRow:
    cores = [each.airlock_cores for each in mine if each.airlock_cores is not None]
    return ExtraRow(
        case=case,
        target=name,
        unit=mine[0].unit,
        value=Spread.of(each.value for each in mine),
        ratio=Spread.of(
            each.value / base.value for each, base in zip(mine, direct, strict=True)
        ),
        airlock_cores=statistics.median(cores) if cores else None,
    )


@contextmanager
def way_to(
    name: str, back: Path, *options: str
) -> Iterator[tuple[Path, Watched | None]]:
    """The socket of a target, and its airlock if there is one."""
    if name == DIRECT:
        yield back, None
        return
    front = back.with_suffix(f".{name}")
    with airlock(back, front, *AIRLOCKS[name], *options) as proxy:
        yield front, Watched(proxy.pid)


def as_text(rows: Iterable[ExtraRow]) -> str:
    lines = []
    last = ""
    for row in rows:
        name = "" if row.case == last else row.case
        cores = (
            "" if row.airlock_cores is None else f", airlock {row.airlock_cores:.2f}"
        )
        lines.append(
            f"{name:<34}{row.target:<10}{row.value.median:>10.2f} {row.unit:<10}"
            f"{row.ratio}{f'{cores} cores' if cores else ''}"
        )
        last = row.case
    return "\n".join(lines)
