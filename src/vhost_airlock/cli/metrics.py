# SPDX-License-Identifier: Apache-2.0
"""Airlocks for Prometheus: its text format, with one family for each number.

The names follow Prometheus's rules: a unit without prefix at the end, then `_total` if
the number can only grow. Counters belong to a session, and begin with zero in the next
one, which rate() and increase() allow for.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .stats_document import Answer, Document, NoStats

PREFIX = "vhost_airlock_"
OF_AIRLOCK = {
    "up": "Whether the airlock answered.",
    "info": "The version of the airlock.",
    "uptime_seconds": "Time since the airlock began.",
    "sessions_total": "VMMs that the airlock has served.",
    "vmm_connected": "Whether a VMM is connected and served.",
    "vmm_waits": "Whether a VMM is connected and not served yet.",
    "backend_connected": "Whether the back-end is connected.",
    "ring_broken": "Whether the ring is broken; the airlock's log says why.",
}
"""Names and help of the numbers that are no counters in the document."""
OF_COUNTERS = {
    ("ring", "chains"): ("chains_total", "Requests taken from the guest."),
    ("ring", "completions"): ("completions_total", "Requests completed for the guest."),
    ("ring", "bytes_in"): ("in_bytes_total", "Copied from the guest to the back-end."),
    ("ring", "bytes_out"): ("out_bytes_total", "Copied to the guest."),
    ("ring", "kicks"): ("kicks_total", "Notifications to the back-end."),
    ("ring", "calls"): ("calls_total", "Notifications to the guest."),
    ("ring", "stalls"): (
        "stalls_total",
        "Times that a request waited for room in the pool or the shadow ring.",
    ),
    ("ring", "violations"): (
        "violations_total",
        "Completions by the back-end of requests that it did not have.",
    ),
    ("ring", "clamped"): (
        "clamped_total",
        "Completions by the back-end with more bytes than there was room for.",
    ),
    ("ring", "faults"): ("faults_total", "Times that the ring broke."),
    ("ring", "outstanding"): ("outstanding", "Requests at the back-end now."),
    ("ring", "quarantined"): (
        "quarantined",
        "Requests that a stop left at the back-end: their buffers are out of use.",
    ),
    ("ring", "adopted"): (
        "adopted_total",
        "Requests that came again after a stop while the back-end still had them.",
    ),
    ("ring", "recovered"): (
        "recovered_total",
        "Requests that were taken up by the VMM's record of requests in flight.",
    ),
    ("ring", "replayed"): (
        "replayed_total",
        "Requests offered to a back-end again that were at the one before.",
    ),
    ("ring", "poisoned"): (
        "poisoned_total",
        "Requests that ended with an error, since the back-end was lost over them.",
    ),
    ("ring", "used"): ("used_bytes", "Of the pool, by the ring now."),
    ("ring", "high_water"): ("high_water_bytes", "The most that the ring ever used."),
    ("ring", "window"): (
        "window_bytes",
        "The most that the ring has in flight for now; 0: there is no limit.",
    ),
    ("ring", "logged"): (
        "logged_pages_total",
        "Times that a page was marked in the VMM's dirty log.",
    ),
    ("ring", "unlogged"): (
        "unlogged_pages_total",
        "Times that a page was written for which the VMM's dirty log had no bit.",
    ),
    ("worker", "rounds"): ("rounds_total", "Rounds over all rings of the worker."),
    ("worker", "sleeps"): ("sleeps_total", "Times that the worker slept."),
    ("worker", "vain"): (
        "vain_total",
        "Wake-ups of the worker by a notification with no request to move.",
    ),
    ("worker", "spins"): ("spins_total", "Looks at all rings while polling."),
    ("worker", "polled"): ("polled_seconds_total", "Time that the worker polled."),
    ("worker", "window"): (
        "window_seconds",
        "Longest time that the worker polls before its next sleep.",
    ),
    ("backend", "losses"): (
        "losses_total",
        "Times that the back-end was lost, and another one was looked for.",
    ),
    ("backend", "away"): ("away_seconds_total", "Time without a back-end."),
    ("backend", "swaps"): (
        "swaps_total",
        "Times that another back-end took the place of one by `vhost-airlock swap`.",
    ),
    ("backend", "paused"): (
        "paused_seconds_total",
        "Time in which the guest's queues stood for that.",
    ),
    ("pool", "used"): ("used_bytes", "Of the pool, by requests now."),
    ("pool", "high_water"): ("high_water_bytes", "The most that requests ever used."),
    ("pool", "resident"): (
        "resident_bytes",
        "Memory that isolated memory takes now, with the shadow rings.",
    ),
    ("pool", "regions"): ("regions", "Regions of the pool that the back-end has."),
}
"""Counters of the document: the part of the name after ring, worker or pool, and help.
The document has nanoseconds where the name has seconds."""


@dataclass(frozen=True)
class Sample:
    metric: str
    labels: dict[str, str]
    value: float


def prometheus(answers: Sequence[Answer], failures: Sequence[NoStats]) -> str:
    """Return the text format of Prometheus: all numbers of all airlocks, by family."""
    samples: list[Sample] = []
    for name, document in _named(answers, failures):
        samples += _samples(name, document)
    lines = []
    for metric, text in _families().items():
        found = [sample for sample in samples if sample.metric == metric]
        if found:
            kind = "counter" if metric.endswith("_total") else "gauge"
            lines.append(f"# HELP {PREFIX}{metric} {text}")
            lines.append(f"# TYPE {PREFIX}{metric} {kind}")
            lines += [_line(sample) for sample in found]
    return "".join(f"{line}\n" for line in lines)


def _families() -> dict[str, str]:
    """Return all metrics with their help."""
    counters = {
        f"{kind}_{name}": text for (kind, _), (name, text) in OF_COUNTERS.items()
    }
    return OF_AIRLOCK | counters


def _named(
    answers: Sequence[Answer], failures: Sequence[NoStats]
) -> list[tuple[str, Document | None]]:
    """Return a name for each airlock, which no other has, and its document.

    Where two have the same name, their sockets' paths are the names.
    """
    found: list[tuple[str, str, Document | None]] = [
        (each.document.name, each.path, each.document) for each in answers
    ]
    found += [(os.path.basename(each.path), each.path, None) for each in failures]
    times = Counter(name for name, _, _ in found)
    return [
        (name if times[name] == 1 else path, document) for name, path, document in found
    ]


def _samples(name: str, document: Document | None) -> Iterator[Sample]:
    labels = {"name": name}
    yield Sample("up", labels, document is not None)
    if document is None:
        return
    yield Sample("info", labels | {"version": document.version}, 1)
    yield Sample("uptime_seconds", labels, document.uptime)
    yield Sample("sessions_total", labels, document.sessions)
    yield Sample("vmm_connected", labels, document.vmm_connected)
    yield Sample("vmm_waits", labels, document.vmm_waits)
    yield Sample("backend_connected", labels, document.backend_connected)
    for ring, condition in document.rings.items():
        broken = condition.get("fault") is not None
        yield Sample("ring_broken", labels | _labels(ring), broken)
    for group, counters in document.counters.items():
        kind = group.split()[0]
        for counter, value in counters.items():
            # A newer airlock may have more, which its own version of this knows.
            if (kind, counter) in OF_COUNTERS:
                metric = f"{kind}_{OF_COUNTERS[kind, counter][0]}"
                base = value / 1e9 if "_seconds" in metric else value
                yield Sample(metric, labels | _labels(group), base)


def _labels(group: str) -> dict[str, str]:
    """Return {"ring": "0"} for "ring 0", nothing for "pool"."""
    kind, _, number = group.partition(" ")
    return {kind: number} if number else {}


def _line(sample: Sample) -> str:
    labels = ",".join(f'{name}="{_escaped(x)}"' for name, x in sample.labels.items())
    return f"{PREFIX}{sample.metric}{{{labels}}} {+sample.value}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
