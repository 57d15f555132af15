# SPDX-License-Identifier: Apache-2.0
"""Loads and runs: plain data, and the figures of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

KIB, MIB = 1 << 10, 1 << 20

WARMED = 0.1
"""Share of a run's time, at either end, that is not used to measure CPU."""


class BenchError(Exception):
    """The bench can't measure here."""


@dataclass(frozen=True, order=True)
class Case:
    """A load that every target gets."""

    mode: str
    """A mode of the load programs."""
    size: int
    """Bytes of a request."""
    depth: int
    """Requests in flight, in each queue."""
    queues: int = 1
    indirect: bool = False
    """Descriptors are in indirect tables."""
    cold: bool = False
    """Buffers are in no cache."""

    @property
    def unit(self) -> str:
        """The size as in 4K or 1M."""
        return f"{self.size // MIB}M" if self.size >= MIB else f"{self.size // KIB}K"

    @property
    def kind(self) -> str:
        """All but the depth: cases of a kind are in one row, or one plot."""
        words = [self.mode, self.unit]
        words += ["2q"] if self.queues == 2 else []
        words += ["indirect"] if self.indirect else []
        words += ["cold"] if self.cold else []
        return "-".join(words)

    def __str__(self) -> str:
        return f"{self.kind}-{self.depth}"


@dataclass(frozen=True)
class Sample:
    """The use up to a moment. Times in nanoseconds; names are of processes."""

    at: int
    """CLOCK_MONOTONIC."""
    cpu: Mapping[str, int]
    machine: int
    """CPU time of everything on the machine, all cores together."""
    switches: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Context switches: (voluntary ones, other ones)."""


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
    p999_us: float
    cpu_us: Mapping[str, float]
    """CPU time for a request, by name of the process."""
    foreign: float
    """Cores that were busy with other programs."""
    switches: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Context switches for a request, by name of the process."""
    notices: Mapping[str, float] = field(default_factory=dict)
    """Kicks and calls for a request, by their sender."""

    @property
    def all_cpu_us(self) -> float:
        """CPU time of all processes for a request."""
        return sum(self.cpu_us.values())


def steady(samples: Sequence[Sample], begin: int, length: int) -> tuple[Sample, Sample]:
    """Return the samples next to begin and end of the time that counts.

    The load was measured for `length` from `begin`; a part at either end is left out.
    """
    margin = int(length * WARMED)
    end = begin + length - margin
    first = min(samples, key=lambda sample: abs(sample.at - begin - margin))
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
    counted: Mapping[str, float] | None = None,
) -> Run:
    """Put together the load program's results and the samples from outside.

    CPU time for a request comes from rates: the CPU time of the processes in a second
    divided by the requests in a second. So it needs no count of requests at either
    sample. The same goes for context switches. `counted` are notifications for each
    request, by the airlock.
    """
    seconds = (last.at - first.at) / 1e9
    cores = {
        name: (last.cpu[name] - first.cpu[name]) / 1e9 / seconds for name in last.cpu
    }
    foreign = (last.machine - first.machine) / 1e9 / seconds - sum(cores.values())
    iops = float(said["iops"])
    if not iops:
        raise BenchError(f"{target}: no request was done in time")
    latency = said["latency_us"]
    notices = {
        f"front {name}": said[name] / said["requests"]
        for name in ("kicks", "calls")
        if said.get("requests") and name in said
    }
    return Run(
        case=case,
        target=target,
        round=number,
        iops=iops,
        mb_per_s=float(said["mb_per_s"]),
        p50_us=float(latency["p50"]),
        p99_us=float(latency["p99"]),
        p999_us=float(latency["p999"]),
        cpu_us={name: used * 1e6 / iops for name, used in cores.items()},
        foreign=foreign,
        switches={
            name: (
                (now[0] - first.switches[name][0]) / seconds / iops,
                (now[1] - first.switches[name][1]) / seconds / iops,
            )
            for name, now in last.switches.items()
            if name in first.switches
        },
        notices={**notices, **(counted or {})},
    )
