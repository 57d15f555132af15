# SPDX-License-Identifier: Apache-2.0
"""How sure a figure is: paired ratios, an interval around their median, a verdict.

Two runs next to each other in time make a pair, and their ratio is free of all that
slowly changes on the machine. The median of many pairs is free of the few that another
program disturbed. How far chance alone may have moved that median, bootstrapping tells:
pairs are drawn again and again from those that were measured, each may come several
times, and in all but one of a hundred draws the median lies within the interval.

A verdict is given only where the whole interval lies on one side of 1.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vhost_airlock.cli.bench_report import Spread

LEVEL = 0.99
"""The share of draws whose median lies in the interval."""
ENOUGH = 8
"""Pairs below which nothing can be told: with 7, chance alone puts all of them on one
side of the true ratio once in 64 times, with 8 once in 128."""
DRAWS = 1000
SEED = 1
"""The same measurements always have the same interval."""


class Verdict(StrEnum):
    """Of one way or build, compared with another."""

    BETTER = "better"
    WORSE = "worse"
    UNSURE = "can't be told"


@dataclass(frozen=True, slots=True)
class Ratio(Spread):
    """A median of paired ratios, and the interval in which it surely lies."""

    pairs: int

    @classmethod
    def of_pairs(cls, ratios: Sequence[float]) -> Ratio:
        """The median of these ratios. ValueError if there are none."""
        return estimate([ratios], lambda drawn: statistics.median(drawn[0]))

    @property
    def side(self) -> int:
        """1: above 1 for sure; -1: below 1 for sure; 0: neither is sure."""
        if self.pairs < ENOUGH:
            return 0
        return (self.low > 1) - (self.high < 1)

    def verdict(self, better: int = 1) -> Verdict:
        """`better`: 1 if more is better, as of rates; -1 if less is, as of time."""
        side = self.side * better
        return (Verdict.UNSURE, Verdict.BETTER, Verdict.WORSE)[side]


def overall(cases: Sequence[Sequence[float]]) -> Ratio:
    """The geometric mean of the median ratios of several loads.

    The pairs that count are those of the load that has the fewest.
    """
    return estimate(
        cases,
        lambda drawn: math.exp(
            statistics.fmean(math.log(statistics.median(case)) for case in drawn)
        ),
    )


def estimate(
    cases: Sequence[Sequence[float]],
    statistic: Callable[[Sequence[Sequence[float]]], float],
) -> Ratio:
    """Return a statistic of some loads' ratios, and its interval by bootstrapping."""
    if not cases or not all(cases):
        raise ValueError("no pairs of runs to compare")
    chance = random.Random(SEED)
    found = sorted(
        statistic([chance.choices(case, k=len(case)) for case in cases])
        for _ in range(DRAWS)
    )
    outside = int(DRAWS * (1 - LEVEL) / 2)
    return Ratio(
        median=statistic(cases),
        low=found[outside],
        high=found[-1 - outside],
        pairs=min(map(len, cases)),
    )
