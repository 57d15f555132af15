# SPDX-License-Identifier: Apache-2.0
"""Runs loads on targets in turn."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bench.fronts import Fronts
from bench.machine import Watched, take_sample
from bench.runs import BenchError, Case, Run, Sample, make_run, steady
from bench.targets import Target
from tests.real.processes import Process

TICK = 0.02
"""Seconds between samples of CPU time."""
PATIENCE = 60.0
"""Seconds that a load may take, beside its time: the machine may be busy."""
HOPELESS = 3
"""Cases that may fail in a row."""


class Bench:
    """The targets, ready to be measured."""

    def __init__(
        self, fronts: Fronts, targets: Sequence[Target], failures: list[str]
    ) -> None:
        self.fronts = fronts
        self.targets = targets
        self.failures = failures
        """Cases that could not be measured, with the reason."""
        self._in_a_row = 0

    def measure_all(
        self, cases: Sequence[Case], rounds: int, progress: Callable[[str], None]
    ) -> Iterator[Run]:
        """Go through all cases in each round."""
        for number in range(rounds):
            ahead = f"{number + 1}/{rounds} "
            yield from self.measure_round(cases, number, progress, ahead)

    def measure_round(
        self,
        cases: Sequence[Case],
        number: int,
        progress: Callable[[str], None],
        ahead: str = "",
        until: float = math.inf,
    ) -> Iterator[Run]:
        """Go through all cases once, or as many as begin until a time of the monotonic
        clock, but at least one.

        A case that fails is left out and noted in `failures`; but when several fail one
        after the other, the fault is elsewhere, and is raised.
        """
        for at, case in enumerate(cases):
            if at and time.monotonic() > until:
                break
            progress(f"{ahead}{case}")
            try:
                runs = self.measure(case, number, turn=number + at)
            except (AssertionError, BenchError) as error:
                self._in_a_row += 1
                self.failures.append(f"{case}: {error}")
                if self._in_a_row == HOPELESS:
                    raise BenchError("\n".join(self.failures)) from None
            else:
                self._in_a_row = 0
                yield from runs

    def measure(self, case: Case, number: int, turn: int) -> list[Run]:
        """Run a load on all targets, beginning with another one at each `turn`."""
        first = turn % len(self.targets)
        order = [*self.targets[first:], *self.targets[:first]]
        return [self.run(case, target, number) for target in order]

    def run(self, case: Case, target: Target, number: int) -> Run:
        target.prepare()
        with target.start(self.fronts, case) as load:
            samples = watch(load, {"front": Watched(load.pid), **target.watched})
            assert load.wait(timeout=0) == 0, load.describe()
            said = what_it_said(load)
        length = self.fronts.ms * 1_000_000
        first, last = steady(samples, int(said["begin_ns"]), length)
        counted = target.counted()
        return make_run(case, target.name, number, said, first, last, counted)


def what_it_said(load: Process) -> Mapping[str, Any]:
    """Return the figures of a load program, of one measurement."""
    said = json.loads(load.output())
    found: Mapping[str, Any] = said[0] if isinstance(said, list) else said
    return found


def watch(load: Process, watched: Mapping[str, Watched]) -> list[Sample]:
    """Take samples until the load program ends."""
    samples = []
    until = time.monotonic() + PATIENCE
    while not load.ended(TICK):
        samples.append(take_sample(watched))
        if time.monotonic() > until:
            raise BenchError(f"it takes too long\n{load.describe()}")
    return samples
