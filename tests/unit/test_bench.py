"""The benchmark's arithmetic: a wrong figure would look like any other."""

import os
import time
from pathlib import Path

import pytest

from bench.machine import cpu_clock, idle_ns, take_sample
from bench.runs import (
    BenchError,
    Case,
    Run,
    Sample,
    Spread,
    make_run,
    steady,
    summarize,
)
from bench.table import full_table, ratio_table

MS = 1_000_000
CASE = Case("randread", 4096, 32)
SAID = {"iops": 50_000, "mb_per_s": 204.8, "latency_us": {"p50": 600.0, "p99": 900.0}}


def a_run(target: str, number: int, iops: float, *, disturbed: bool = False) -> Run:
    cpu = {"front": 1.0, "back": 4.0}
    return Run(CASE, target, number, iops, iops / 250, 1, 2, cpu, 0.1, disturbed)


def samples_every(step: int, until: int) -> list[Sample]:
    return [Sample(at, {}, 0) for at in range(0, until, step)]


def test_case_has_the_name_that_people_say():
    assert str(CASE) == "randread-4K-32"
    assert str(Case("randwrite", 1 << 20, 8)) == "randwrite-1M-8"


def test_steady_leaves_out_connecting_and_leaving():
    samples = samples_every(10 * MS, until=500 * MS)
    first, last = steady(samples, end=500 * MS, length=300 * MS)
    assert first.at == 230 * MS  # the load began at 200, and 30 are left out
    assert last.at == 470 * MS  # and 30 before the end


def test_steady_makes_do_with_the_nearest_samples():
    first, last = steady(samples_every(140 * MS, 600 * MS), 650 * MS, 300 * MS)
    assert (first.at, last.at) == (420 * MS, 560 * MS)


def test_steady_refuses_too_few_samples():
    with pytest.raises(BenchError, match="3 samples"):
        steady(samples_every(200 * MS, until=600 * MS), end=650 * MS, length=300 * MS)


def test_cpu_of_a_request_and_foreign_load():
    """A quarter of a second: 0.05 s front, 0.2 s back, 0.35 s on all cores."""
    first = Sample(0, {"front": 7, "back": 9}, 11)
    cpu = {"front": 50 * MS + 7, "back": 200 * MS + 9}
    last = Sample(250 * MS, cpu, 350 * MS + 11)
    run = make_run(CASE, "direct", 3, SAID, first, last, bound=0.5)
    assert run.cpu_us == pytest.approx({"front": 4.0, "back": 16.0})
    assert run.foreign == pytest.approx(0.4)
    assert not run.disturbed
    assert make_run(CASE, "direct", 3, SAID, first, last, bound=0.3).disturbed
    assert (run.iops, run.mb_per_s, run.p50_us, run.p99_us) == (50_000, 204.8, 600, 900)


def test_ratios_are_paired_by_round():
    """The machine got slower from round to round; the ratio stays what it is."""
    speed = {0: 100.0, 1: 50.0, 2: 10.0}
    runs = [a_run("direct", n, iops) for n, iops in speed.items()]
    runs += [a_run("airlock", n, iops * 0.9) for n, iops in reversed(speed.items())]
    direct, airlock = summarize(runs, "direct")
    assert direct.ratio == Spread(1, 1, 1)
    assert airlock.ratio.median == pytest.approx(0.9)
    assert airlock.ratio.high - airlock.ratio.low < 1e-9
    assert airlock.iops == Spread(45, 9, 90)


def test_median_and_spread_of_ratios():
    runs = [a_run("direct", n, 100) for n in range(3)]
    runs += [a_run("airlock", n, iops) for n, iops in enumerate((120, 60, 80))]
    airlock = summarize(runs, "direct")[1]
    assert airlock.ratio == Spread(0.8, 0.6, 1.2)
    assert airlock.runs == 3
    assert airlock.cpu_us == {"front": 1.0, "back": 4.0}


def test_a_run_without_its_reference_counts_nowhere():
    """As after an interruption: the last round is not complete."""
    assert summarize([a_run("airlock", 0, 100)], "direct") == []


def test_tables_show_disturbed_rows_with_a_star():
    runs = [
        a_run("direct", 0, 100_000),
        a_run("airlock", 0, 91_000, disturbed=True),
        a_run("blocking", 0, 80_000),
    ]
    rows = summarize(runs, "direct")
    assert ratio_table(rows, "airlock").split()[-1] == "0.91*"
    assert ratio_table(rows, "blocking").split()[-1] == "0.80"
    lines = full_table(rows).splitlines()
    assert lines[-2].split()[:3] == ["airlock", "91000", "364"]
    assert lines[-2].endswith("0.91 (0.91-0.91)*")
    assert lines[-1].endswith("0.80 (0.80-0.80)")


def test_ratio_table_leaves_out_what_was_not_measured():
    case = Case("randwrite", 65536, 1)
    other = Run(case, "direct", 0, 1000, 4, 1, 2, {"front": 1.0}, 0, False)
    rows = summarize([a_run("direct", 0, 100), other], "direct")
    head, read, write = ratio_table(rows, "direct").splitlines()
    assert head.split()[-2:] == ["1", "32"]
    assert read.endswith("    1.00")
    assert write.split() == ["64K", "randwrite", "1.00"]
    assert len(write) == len(read) - 8


def test_idle_time_is_that_of_all_cores():
    stat = "cpu  80 1 30 200 50 2 3 4 0 0\ncpu0 40 1 15 100 25 1 1 2 0 0\n"
    assert idle_ns(stat) == 250 * 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def test_samples_see_our_own_work():
    clocks = {"me": cpu_clock(os.getpid())}
    first = take_sample(clocks)
    while time.process_time_ns() < first.cpu["me"] + 50 * MS:
        pass
    last = take_sample(clocks)
    spent = last.cpu["me"] - first.cpu["me"]
    assert 50 * MS <= spent <= (last.at - first.at) * 1.01
    assert last.machine - first.machine >= spent - 20 * MS


def test_a_process_that_is_gone_has_no_clock():
    with pytest.raises(OSError, match="No such process"):
        cpu_clock(int(Path("/proc/sys/kernel/pid_max").read_text()))
