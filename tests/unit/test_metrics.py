# SPDX-License-Identifier: Apache-2.0
"""The text for Prometheus, as the parser of its own library reads it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.support.stats import BEFORE
from vhost_airlock.cli.metrics import OF_COUNTERS, prometheus
from vhost_airlock.cli.stats_document import Answer, Document, NoStats

EVERYTHING = replace(
    BEFORE,
    counters={
        f"{kind} 0" if kind in ("ring", "worker") else kind: {
            counter: 1 for each, counter in OF_COUNTERS if each == kind
        }
        for kind in ("ring", "worker", "backend", "pool")
    },
)
"""An airlock with all counters that there are."""


def families(*answers: Answer, failures: list[NoStats] | None = None) -> list[Metric]:
    return list(text_string_to_metric_families(prometheus(answers, failures or [])))


def samples(found: list[Metric]) -> dict[tuple[str, tuple[str, ...]], float]:
    """Each sample's name, and the values of its labels, to its value."""
    every = [each for family in found for each in family.samples]
    by_name = {
        (
            each.name.removeprefix("vhost_airlock_"),
            tuple(each.labels.values()),
        ): each.value
        for each in every
    }
    assert len(by_name) == len(every), "no sample is there twice"
    return by_name


def told(document: Document, path: str = "stats") -> Answer:
    return Answer(path, "", document)


def test_every_number_is_a_sample() -> None:
    found = samples(families(told(BEFORE)))
    counters = sum(len(each) for each in BEFORE.counters.values())
    assert len(found) == counters + len(BEFORE.rings) + 7
    name = "disk.sock"
    expected = {
        ("up", (name,)): 1,
        ("info", (name, "1.2.3")): 1,
        ("uptime_seconds", (name,)): 100,
        ("sessions_total", (name,)): 2,
        ("vmm_connected", (name,)): 1,
        ("vmm_waits", (name,)): 0,
        ("backend_connected", (name,)): 1,
        ("ring_broken", (name, "1")): 1,
        ("ring_broken", (name, "2")): 0,
        ("ring_chains_total", (name, "0")): 1000,
        ("ring_chains_total", (name, "1")): 0,
        ("ring_in_bytes_total", (name, "0")): 10 << 20,
        ("worker_polled_seconds_total", (name, "0")): 1,
        ("pool_used_bytes", (name,)): 4096,
    }
    assert found.items() >= expected.items()


def test_large_numbers_are_exact_and_short_times_are_kept() -> None:
    counters = {"ring 0": {"bytes_in": (1 << 53) - 1}, "worker 0": {"window": 1}}
    found = samples(families(told(replace(BEFORE, counters=counters))))
    assert found["ring_in_bytes_total", ("disk.sock", "0")] == (1 << 53) - 1
    assert found["worker_window_seconds", ("disk.sock", "0")] == 1e-9


def test_each_family_is_there_once_with_the_samples_of_all_airlocks() -> None:
    found = families(
        told(BEFORE), told(replace(BEFORE, name="net.sock", rings={}, counters={}))
    )
    names = [family.name for family in found]
    assert len(set(names)) == len(names)
    by_name = {family.name: family for family in found}
    up = by_name["vhost_airlock_up"].samples
    assert [each.labels["name"] for each in up] == ["disk.sock", "net.sock"]
    # A family without a sample is left out.
    assert not [family for family in found if not family.samples]


def test_airlocks_of_one_name_are_told_apart_by_path() -> None:
    failed = NoStats("/c/disk.sock", "no answer")
    found = samples(
        families(told(BEFORE, "/a/s"), told(BEFORE, "/b/s"), failures=[failed])
    )
    up = {labels: value for (name, labels), value in found.items() if name == "up"}
    assert up == {("/a/s",): 1, ("/b/s",): 1, ("/c/disk.sock",): 0}


def test_labels_may_have_any_characters() -> None:
    name = 'a "b" \\ c\nd ä {x="y"}'
    (found,) = (
        each
        for family in families(told(replace(BEFORE, name=name)))
        for each in family.samples
        if each.name == "vhost_airlock_up"
    )
    assert found.labels == {"name": name}


def test_counter_of_a_newer_airlock_is_left_out() -> None:
    counters = {"ring 0": {"chains": 1, "new": 2}, "news 0": {"chains": 3}}
    found = samples(families(told(replace(BEFORE, counters=counters, rings={}))))
    assert len(found) == 7 + 1


def test_names_follow_the_rules() -> None:
    """Those that `promtool check metrics` has."""
    found = families(told(EVERYTHING))
    assert len(found) == len(OF_COUNTERS) + 8
    for family in found:
        assert family.documentation.endswith("."), family.name
        assert re.fullmatch(r"vhost_airlock(_[a-z]+)+", family.name)
        # The parser takes _total off the names of counters, and of no others.
        assert family.type in ("counter", "gauge"), family.name
        names = {each.name for each in family.samples}
        end = "_total" if family.type == "counter" else ""
        assert names == {family.name + end}
        assert not family.name.endswith(("_total", "_count", "_sum", "_bucket"))
        words = set(family.name.split("_"))
        units = {"ns", "us", "ms", "s", "kb", "mb", "mib", "nanoseconds", "percent"}
        assert not words & (units | {"counter", "gauge", "histogram", "metric"})
        if words & {"bytes", "seconds"}:
            assert family.name.endswith(("_bytes", "_seconds")), family.name


def test_names_in_the_manual_are_metrics() -> None:
    manual = Path(__file__).parents[2].joinpath("docs", "operating.md").read_text()
    named = set(re.findall(r"vhost_airlock_\w+", manual))
    samples = {x.name for each in families(told(EVERYTHING)) for x in each.samples}
    assert len(named) >= 5
    assert named <= samples
