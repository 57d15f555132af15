# SPDX-License-Identifier: Apache-2.0
"""The state of an airlock for people: rates, and a table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.support.stats import BEFORE, later
from vhost_airlock.cli.stats_table import MIB, Rates, rates_line, table


def test_rates_are_differences_by_time_and_by_request() -> None:
    after = later(
        4.0,
        ring_0={"chains": 500, "completions": 600, "kicks": 50, "bytes_in": 6 * MIB},
        ring_1={"chains": 300, "completions": 200, "calls": 200, "bytes_out": 2 * MIB},
        worker_0={"polled": 1_000_000_000, "sleeps": 30},
        worker_1={"polled": 3_000_000_000, "sleeps": 50},
    )
    after.counters["ring 1"]["outstanding"] = 3
    assert Rates.between(BEFORE, after) == Rates(
        requests=800 / 4,
        mib_in=6 / 4,
        mib_out=2 / 4,
        kicks=50 / 800,
        calls=200 / 800,
        sleeps=80 / 4,
        polling=4 / (4 * 2),
        outstanding=7 + 3,
    )


def test_nothing_done_is_no_ratio() -> None:
    rates = Rates.between(BEFORE, later(1.0))
    assert (rates.requests, rates.kicks, rates.calls) == (0, None, None)
    assert rates_line(rates).split() == [
        "0",
        "0.0",
        "0.0",
        "-",
        "-",
        "0",
        "0.0%",
        "7",
    ]


@pytest.mark.parametrize(
    ("change", "seconds"),
    [({"sessions": 3, "uptime": 102.0}, 2.0), ({"uptime": 5.0}, 5.0)],
    ids=["session", "process"],
)
def test_what_is_new_has_counted_from_zero(
    change: dict[str, Any], seconds: float
) -> None:
    rates = Rates.between(BEFORE, replace(BEFORE, **change))
    assert rates.requests == 900 / seconds
    assert rates.kicks == 100 / 1000


def test_session_that_ends_has_no_negative_rates() -> None:
    after = replace(later(1.0), rings={}, counters={}, vmm_connected=False)
    assert Rates.between(BEFORE, after) == Rates(0, 0, 0, None, None, 0, 0, 0)


def test_table_has_all_there_is() -> None:
    lines = table(BEFORE).splitlines()
    assert lines[:2] == [
        "disk.sock: VMM connected, back-end connected",
        "vhost-airlock 1.2.3, up 0:01:40, sessions: 2",
    ]
    cells = [line.split() for line in lines]
    assert ["ring", "0", "ring", "1", "ring", "2"] in cells
    assert ["phase", "running", "disabled", "stopped"] in cells
    assert ["bytes_in", f"{10 * MIB:,}", "0", "-"] in cells
    assert "worker 0: rounds 5,000, sleeps 50, polled 1,000,000,000" in lines
    assert "pool: used 4,096, resident 8,192" in lines
    assert lines[-1] == "ring 1 is broken: it fell over"
    assert max(map(len, lines)) <= 88


def test_table_without_a_session() -> None:
    idle = replace(
        BEFORE, vmm_connected=False, backend_connected=False, rings={}, counters={}
    )
    assert table(idle) == (
        "disk.sock: no VMM, no back-end\nvhost-airlock 1.2.3, up 0:01:40, sessions: 2"
    )


def test_table_says_that_a_vmm_waits() -> None:
    second = replace(BEFORE, vmm_waits=True)
    first = replace(second, vmm_connected=False, backend_connected=False)
    assert [table(each).splitlines()[0] for each in (second, first)] == [
        "disk.sock: VMM connected, another waits, back-end connected",
        "disk.sock: VMM waits, no back-end",
    ]


def test_rings_of_a_large_device_stand_below_each_other() -> None:
    rings = {f"ring {i}": {"phase": "running", "fault": None} for i in range(9)}
    counters = {ring: {"chains": i} for i, ring in enumerate(rings)}
    lines = table(replace(BEFORE, rings=rings, counters=counters)).splitlines()
    chains = [line.split()[1:] for line in lines if line.startswith("chains")]
    assert chains == [list("0123"), list("4567"), ["8"]]
    assert max(map(len, lines)) <= 88
