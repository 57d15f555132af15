# SPDX-License-Identifier: Apache-2.0
"""The benchmark's arithmetic: a wrong figure would look like any other."""

import contextlib
import os
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import cases
from bench.bench import parse
from bench.document import DOCUMENT, POLLED, parts, replaced
from bench.extras import ExtraRow, Figure, in_rounds
from bench.fronts import Fronts
from bench.goals import Goal
from bench.html import page, shade
from bench.look import HATCHING, LOOKS, style_sheet
from bench.machine import (
    Watched,
    context_switches,
    cpu_clock,
    idle_cores_poll,
    idle_ns,
    idle_poll_us,
    take_sample,
)
from bench.measure import Bench
from bench.rows import ALL, OWN, RATE, means, medians, summarize, verdict
from bench.runs import BenchError, Case, Run, Sample, make_run, steady
from bench.sure import ENOUGH, Ratio, Verdict
from bench.svg import Series, bars, lines, nice, short
from bench.table import full_table, heading, report, verdict_table
from bench.targets import NAMES, QUICK, per_request
from vhost_airlock.cli.bench_report import Spread

MS = 1_000_000
CASE = Case("randread", 4096, 32)
SAID = {
    "iops": 50_000,
    "mb_per_s": 204.8,
    "latency_us": {"p50": 600.0, "p99": 900.0, "p999": 950.0},
}


def a_run(target: str, number: int, iops: float) -> Run:
    cpu = {"front": 1.0, "back": 4.0}
    if target != "direct":
        cpu["airlock"] = 2.0
    return Run(CASE, target, number, iops, iops / 250, 1, 2, 3, cpu, 0.1)


def samples_every(step: int, until: int) -> list[Sample]:
    return [Sample(at, {}, 0) for at in range(0, until, step)]


def test_case_has_the_name_that_people_say():
    assert str(CASE) == "randread-4K-32"
    assert str(Case("randwrite", 1 << 20, 8)) == "randwrite-1M-8"
    special = Case("read", 1 << 16, 8, queues=2, indirect=True, cold=True)
    assert str(special) == "read-64K-2q-indirect-cold-8"


def test_case_names_are_unique():
    for form in (cases.quick, cases.long):
        names = [str(case) for case in form()]
        assert len(names) == len(set(names)) >= 10


def test_cases_are_chosen_by_name():
    found = cases.chosen(cases.long(), "rand*-64K-32")
    assert [str(case) for case in found] == ["randread-64K-32", "randwrite-64K-32"]
    assert cases.chosen(cases.quick(), "nothing") == []


def test_steady_leaves_out_connecting_and_leaving():
    samples = samples_every(10 * MS, until=500 * MS)
    first, last = steady(samples, begin=150 * MS, length=300 * MS)
    assert first.at == 180 * MS  # 30 are left out
    assert last.at == 420 * MS  # and 30 before the end


def test_steady_makes_do_with_the_nearest_samples():
    first, last = steady(samples_every(140 * MS, 600 * MS), 350 * MS, 300 * MS)
    assert (first.at, last.at) == (420 * MS, 560 * MS)


def test_steady_refuses_too_few_samples():
    with pytest.raises(BenchError, match="3 samples"):
        steady(samples_every(200 * MS, until=600 * MS), begin=350 * MS, length=30 * MS)


def test_cpu_of_a_request_and_foreign_load():
    """A quarter of a second: 0.05 s front, 0.2 s back, 0.35 s on all cores."""
    first = Sample(0, {"front": 7, "back": 9}, 11)
    cpu = {"front": 50 * MS + 7, "back": 200 * MS + 9}
    last = Sample(250 * MS, cpu, 350 * MS + 11)
    run = make_run(CASE, "direct", 3, SAID, first, last)
    assert run.cpu_us == pytest.approx({"front": 4.0, "back": 16.0})
    assert run.foreign == pytest.approx(0.4)
    assert (run.iops, run.mb_per_s) == (50_000, 204.8)
    assert (run.p50_us, run.p99_us, run.p999_us) == (600, 900, 950)
    assert run.notices == {}


def test_context_switches_and_notices_of_a_request():
    """Half a second at 50000 requests a second."""
    idle = {"front": 0}
    first = Sample(0, idle, 0, {"front": (100, 10), "new": (1, 1)})
    last = Sample(500 * MS, idle, 0, {"front": (5100, 60), "late": (9, 9)})
    said = {**SAID, "requests": 1000, "kicks": 250, "calls": 100}
    run = make_run(CASE, "airlock", 0, said, first, last, {"airlock kicks": 0.5})
    assert run.switches == {"front": pytest.approx((0.2, 0.002))}
    assert run.notices == pytest.approx(
        {"front kicks": 0.25, "front calls": 0.1, "airlock kicks": 0.5}
    )


def test_run_in_which_nothing_was_done_has_no_figures():
    sample = Sample(0, {"front": 0}, 0)
    said = {**SAID, "iops": 0}
    with pytest.raises(BenchError, match="nbd: no request"):
        make_run(CASE, "nbd", 0, said, sample, replace(sample, at=MS))


def test_ratios_are_paired_by_round():
    """The machine got slower from round to round; the ratio stays what it is."""
    speed = {0: 100.0, 1: 50.0, 2: 10.0}
    runs = [a_run("direct", n, iops) for n, iops in speed.items()]
    runs += [a_run("airlock", n, iops * 0.9) for n, iops in reversed(speed.items())]
    direct, airlock = summarize(runs, "direct")
    assert direct.ratio == Ratio(1, 1, 1, pairs=3)
    assert airlock.ratio.median == pytest.approx(0.9)
    assert airlock.ratio.high - airlock.ratio.low < 1e-9
    assert airlock.iops == Spread(45, 9, 90)


def test_median_and_spread_of_ratios():
    runs = [a_run("direct", n, 100) for n in range(3)]
    runs += [a_run("airlock", n, iops) for n, iops in enumerate((120, 60, 80))]
    airlock = summarize(runs, "direct")[1]
    assert airlock.ratio == Ratio(0.8, 0.6, 1.2, pairs=3)
    assert airlock.runs == 3
    assert airlock.cpu_us == {"front": 1.0, "back": 4.0, "airlock": 2.0}


def test_medians_are_of_what_all_runs_have():
    figures = [{"a": 1.0, "b": 5.0}, {"a": 3.0}, {"a": 2.0, "b": 6.0}]
    assert medians(figures) == {"a": 2.0}


def test_a_run_without_its_reference_counts_nowhere():
    """As after an interruption: the last round is not complete."""
    assert summarize([a_run("airlock", 0, 100)], "direct") == []


def runs_of(pairs: int, *factors: float) -> list[Run]:
    """The same load on targets whose rates are these multiples of that of direct.

    The machine is twice as fast from run to run, for all targets alike.
    """
    names = ("direct", "airlock", "blocking")
    return [
        a_run(name, number, 1000 * 2**number * factor)
        for number in range(pairs)
        for name, factor in zip(names, (1.0, *factors), strict=False)
    ]


def test_verdicts_are_of_pairs():
    runs = runs_of(ENOUGH, 0.9, 1.25)
    rows = summarize(runs, "direct")
    text = verdict_table("t", rows[1:2], means(runs, "airlock", "direct"))
    head, row, mean = text.splitlines()
    assert head.split() == ["t", *ALL.split(), *RATE.split()]
    # All CPU time: 7 us a request with the airlock, 5 without.
    for line in (row, mean):
        assert line.split()[-6:] == [
            *("1.40", "(1.40-1.40)", "worse"),
            *("0.90", "(0.90-0.90)", "worse"),
        ]
    (_, row, _) = verdict_table("t", rows[2:], {}).splitlines()
    assert row.endswith("1.25 (1.25-1.25)  better")


def test_few_pairs_have_no_verdict():
    runs = runs_of(ENOUGH - 1, 0.5)
    rows = summarize(runs, "direct")
    text = report(rows, "direct", ["airlock"], {})
    assert "0.50 (0.50-0.50)  can't be told" in text
    assert "7 pairs of runs, fewer than the 8" in text
    assert "8 pairs of runs" in report(summarize(runs_of(8, 1), "direct"), "", [], {})


def test_own_cpu_time_is_compared_between_airlocks():
    runs = [a_run("before", number, 100) for number in range(ENOUGH)]
    runs += [
        replace(run, target="now", cpu_us={**run.cpu_us, "airlock": 1.5})
        for run in runs
    ]
    now = summarize(runs, "before")[1]
    assert now.ratios[OWN].median == 0.75
    assert now.ratios[ALL].median == pytest.approx(6.5 / 7)
    assert verdict(OWN, now.ratios[OWN]) is Verdict.BETTER
    # Where the reference has no airlock there is nothing to compare.
    assert OWN not in summarize(runs_of(3, 1.0), "direct")[1].ratios


def test_mean_is_over_the_cases():
    """Twice as fast in one case and half as fast in the other: the same in all."""
    runs = []
    for case, factor in ((CASE, 2.0), (replace(CASE, depth=1), 0.5)):
        runs += [replace(run, case=case) for run in runs_of(ENOUGH, factor)]
    assert means(runs, "airlock", "direct")[RATE].median == pytest.approx(1)


def test_table_has_kicks_of_both_and_calls():
    run = replace(
        a_run("airlock", 0, 100_000),
        notices={"front kicks": 0.25, "airlock kicks": 0.5, "airlock calls": 0.75},
        switches={"front": (1.0, 0.5), "airlock": (0.25, 0.0)},
    )
    rows = summarize([a_run("direct", 0, 100_000), run], "direct")
    assert full_table(rows).splitlines()[-1].split("|")[2].split() == [
        "0.25/0.50",
        "0.75",
        "1.75",
    ]


def test_idle_time_is_that_of_all_cores():
    stat = "cpu  80 1 30 200 50 2 3 4 0 0\ncpu0 40 1 15 100 25 1 1 2 0 0\n"
    assert idle_ns(stat) == 250 * 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def test_idle_cores_poll_as_long_as_it_is_measured(tmp_path):
    knob = tmp_path / "knob"
    knob.write_text("50000\n")
    with idle_cores_poll(None, knob):
        assert idle_poll_us(knob) == 50
    with contextlib.suppress(KeyboardInterrupt), idle_cores_poll(200, knob):
        assert idle_poll_us(knob) == 200
        raise KeyboardInterrupt
    assert knob.read_text() == "50000\n"


def test_where_idle_cores_cannot_poll_that_is_said(tmp_path):
    missing = tmp_path / "missing"
    assert idle_poll_us(missing) is None
    with (
        pytest.raises(BenchError, match=r"idle cores poll for 7 us: .*missing"),
        idle_cores_poll(7, missing),
    ):
        pass


def test_samples_see_our_own_work():
    me = {"me": Watched(os.getpid())}
    first = take_sample(me)
    while time.process_time_ns() < first.cpu["me"] + 50 * MS:
        pass
    last = take_sample(me)
    spent = last.cpu["me"] - first.cpu["me"]
    assert 50 * MS <= spent <= (last.at - first.at) * 1.01
    assert last.machine - first.machine >= spent - 20 * MS


def test_a_process_that_is_gone_has_no_clock():
    with pytest.raises(OSError, match="No such process"):
        cpu_clock(int(Path("/proc/sys/kernel/pid_max").read_text()))


def test_context_switches_are_read_from_a_status():
    status = (
        "Name:\tx\nvoluntary_ctxt_switches:\t150\nnonvoluntary_ctxt_switches:\t545\n"
    )
    assert context_switches(status) == (150, 545)


def test_context_switches_of_all_threads_are_seen():
    """A thread that waits a hundred times has given up its processor as often."""
    ready, go = threading.Event(), threading.Event()
    ping, pong = os.pipe(), os.pipe()

    def answer() -> None:
        for _ in range(100):
            os.read(ping[0], 1)
            os.write(pong[1], b"x")
        ready.set()
        go.wait()

    watched = Watched(os.getpid())
    thread = threading.Thread(target=answer)
    thread.start()
    before = watched.switches()
    for _ in range(100):
        os.write(ping[1], b"x")
        os.read(pong[0], 1)
    ready.wait()
    after = watched.switches()
    go.set()
    thread.join()
    assert watched.switches() >= after, "what a thread has done is not undone"
    for fd in (*ping, *pong):
        os.close(fd)
    assert after[0] - before[0] >= 100


def test_counters_of_an_airlock_are_for_each_request():
    ring = {"completions": 100, "kicks": 10, "calls": 30}
    other = {"completions": 300, "kicks": 30, "calls": 10}
    counters = {
        "ring 0": ring,
        "ring 1": other,
        "worker 0": {"sleeps": 100},
        "pool": {},
    }
    assert per_request(counters) == {
        "airlock kicks": 0.1,
        "airlock calls": 0.1,
        "airlock sleeps": 0.25,
    }


def test_counters_of_nothing():
    assert per_request({})["airlock kicks"] == 0


# Options.


def test_short_form_is_the_default():
    options = parse([])
    assert options.targets == list(QUICK)
    assert options.parts == ["disk"]


def test_long_form_has_everything_but_what_is_said():
    options = parse(["--long", "--ms=100"])
    assert options.targets == list(NAMES)
    assert "goals" in options.parts
    assert options.ms == 100


def test_reference_is_always_measured():
    assert parse(["--targets=nbd,airlock"]).targets == ["direct", "airlock", "nbd"]


@pytest.mark.parametrize("option", ["--targets=direkt", "--parts=dusk", "--rounds=x"])
def test_options_that_make_no_sense(capsys, option):
    with pytest.raises(SystemExit):
        parse([option])
    assert option.partition("=")[2] in capsys.readouterr().err


# Loads that fail.


class Failing(Bench):
    """It measures nothing, and fails at these depths."""

    def __init__(self, *depths: int) -> None:
        super().__init__(Fronts.__new__(Fronts), [], [])
        self.depths = depths

    def measure(self, case: Case, number: int, turn: int) -> list[Run]:
        if case.depth in self.depths:
            raise BenchError("out of order")
        return [replace(a_run("direct", number, 1), case=case)]


def test_case_that_fails_is_left_out():
    loads = [Case("randread", 4096, depth) for depth in range(1, 6)]
    bench = Failing(1, 2, 4, 5)
    runs = list(bench.measure_all(loads, 1, lambda _: None))
    assert [run.case.depth for run in runs] == [3]
    assert bench.failures[0] == "randread-4K-1: out of order"
    assert len(bench.failures) == 4


def test_cases_that_all_fail_end_it():
    loads = [Case("randread", 4096, depth) for depth in range(1, 6)]
    with pytest.raises(BenchError, match="randread-4K-4: out of order"):
        list(Failing(2, 3, 4).measure_all(loads, 1, lambda _: None))


# Other devices.


def test_other_devices_are_compared_round_by_round(monkeypatch):
    monkeypatch.setattr("bench.extras.MOMENT", 0)
    order = []

    def measure(name: str) -> dict[str, Figure]:
        order.append(name)
        # The second round begins with the other one, on a machine half as fast.
        value = {"direct": 100.0, "airlock": 90.0}[name] / (1 if len(order) < 3 else 2)
        cores = 0.5 if name == "airlock" else None
        return {"net": Figure(value, "Mpackets/s", cores)}

    direct, airlock = in_rounds(["direct", "airlock"], 2, measure)
    assert order == ["direct", "airlock", "airlock", "direct"]
    assert (direct.ratio, direct.airlock_cores) == (Spread(1, 1, 1), None)
    assert airlock.ratio == Spread(0.9, 0.9, 0.9)
    assert airlock.value == Spread(67.5, 45, 90)
    assert airlock.airlock_cores == 0.5


# The page and the document.

MACHINE = {
    "cpu": "A <CPU>",
    "cores": 2,
    "virtual": True,
    "idle_poll_us": None,
    "kernel": "6",
    "qemu-storage-daemon": "11",
    "libblkio": "1",
    "vhost-airlock": "0",
    "commit": "abc",
}
GOALS = [Goal("idle", "1 context switch", "none", met=False)]
HALF = Spread(0.5, 0.4, 0.6)
EXTRAS = [ExtraRow("net", "airlock", "Mpackets/s", HALF, HALF, 0.7)]


def some_rows(pairs: int = 1):
    runs = []
    for depth in (1, 32):
        case = Case("randread", 4096, depth)
        for target, iops in (("direct", 10_000.0), ("airlock", 8_000.0)):
            for number in range(pairs):
                run = a_run(target, number, iops * depth)
                runs.append(replace(run, case=case))
    return summarize(runs, "direct")


def charts(text: str) -> list[ElementTree.Element]:
    """The charts of a page. The keys beside names are pictures too, but no charts."""
    found = re.findall(r'<svg [^>]*role="img".*?</svg>', text, re.S)
    return [ElementTree.fromstring(each) for each in found]


def with_class(chart: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [each for each in chart.iter() if each.get("class") == name]


def test_page_has_everything():
    text = page(MACHINE, "today", some_rows(), GOALS, EXTRAS)
    assert "A &lt;CPU&gt;" in text
    assert text.count("<td>randread-4K-") == 2
    assert text.count(f"background:{shade(0.8)}") == 2
    assert "1 context switch" in text
    assert "not met" in text
    assert "Mpackets/s" in text
    assert len(charts(text)) == 4  # rate, latency, and CPU time of two cases
    assert "http" not in text, "it must not need anything"


@pytest.mark.parametrize(
    ("rows", "goals", "extras", "words"),
    [
        (
            some_rows(),
            GOALS,
            EXTRAS,
            "a disk has 0.80 of the rate of a direct connection",
        ),
        ([], GOALS, EXTRAS, "another device has 0.50 of the rate"),
        ([], GOALS, [], "The airlock meets 0 of 1 goals."),
    ],
)
def test_page_begins_with_the_result(rows, goals, extras, words):
    text = page(MACHINE, "today", rows, goals, extras)
    found = re.findall(r"<p.*?</p>", text)[0]
    assert words in found
    assert found.startswith('<p class="result">')


def test_each_chart_tells_which_figures_are_good():
    told = [
        with_class(chart, "unit")[0].text
        for chart in charts(page(MACHINE, "today", some_rows()))
    ]
    assert told == [
        "requests a second; higher is better",
        "us; lower is better",
        "us a request; lower is better",
        "us a request; lower is better",
    ]


def test_targets_differ_without_their_colours():
    assert list(LOOKS) == list(NAMES)
    assert len({look.mark for look in LOOKS.values()}) == len(NAMES)
    assert len({pattern for _, _, pattern in HATCHING.values()}) == len(HATCHING)


def light_of(colour: str) -> float:
    """The relative luminance of #rrggbb, by WCAG 2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in parts
    ]
    return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_targets_are_seen_on_a_light_and_on_a_dark_page():
    """WCAG 2 asks for a contrast of 3 in pictures."""
    light, dark = re.findall(r"--page: (#\w+)", style_sheet())
    assert light == "#fff"
    for name, look in LOOKS.items():
        assert 1.05 / (light_of(look.light) + 0.05) >= 3, name
        assert (light_of(look.dark) + 0.05) / (light_of(dark) + 0.05) >= 3, name


def test_each_line_has_its_targets_look():
    text = page(MACHINE, "today", some_rows())
    rate, *_ = charts(text)
    for name in ("direct", "airlock"):
        (line,) = with_class(rate, name)
        assert {each.get("d") for each in with_class(line, "mark")} == {
            LOOKS[name].mark
        }
        assert f".{name} polyline" in text
        assert f'class="key {name}"' in text


def test_page_marks_what_is_not_sure():
    assert "0.80?" in page(MACHINE, "today", some_rows())
    assert "0.80?" not in page(MACHINE, "today", some_rows(ENOUGH))


def test_page_of_one_part():
    assert "All figures" not in page(MACHINE, "today", [], GOALS)
    assert "Goals" not in page(MACHINE, "today", some_rows())


def test_shades_tell_faster_from_slower():
    assert shade(1) == "color-mix(in srgb,var(--fast) 0%,var(--page))"
    assert shade(2) == "color-mix(in srgb,var(--fast) 50%,var(--page))"
    assert shade(0.5) == "color-mix(in srgb,var(--slow) 50%,var(--page))"
    assert shade(0) == shade(0.01) == shade(0.25)


@pytest.mark.parametrize(("decades", "height"), [(False, 0.5), (True, 2 / 3)])
def test_points_are_as_high_as_figures(decades, height):
    """100 on a scale from 0 to 200, or on one of decades from 1 to 1000."""
    values = [Spread(100, 100, 200), None, Spread(5, 5, 5)]
    series = [
        Series("a", "M0 0z", values),
        Series("b", "M1 1z", [Spread(150, 2, 200)] * 3),
    ]
    steps = ["1", "2", "3"]
    (chart,) = charts(lines("t", steps, series, "us", "lower", decades=decades))
    marks = with_class(chart, "mark")
    assert len(marks) == 5
    grid = [each.get("d", "") for each in with_class(chart, "grid")]
    bottom, *_, top = (float(mark.split()[1].partition("H")[0]) for mark in grid)
    at = float(marks[0].get("transform", "").split()[1].rstrip(")"))
    found = (bottom - at) / (bottom - top)
    assert found == pytest.approx(height, abs=0.01)


def test_bars_are_as_long_as_figures():
    rows = [("direct", {"a": 1.0, "b": 3.0}), ("airlock", {"a": 2.0})]
    (chart,) = charts(bars("t", rows, "us", "lower"))
    widths = [float(each.get("width", "")) for each in chart.iter("rect")]
    assert [width / widths[0] for width in widths] == pytest.approx([1, 3, 2], abs=0.01)
    assert {each.text for each in chart.iter("text")} >= {"4", "2", "direct", "airlock"}
    assert [each.get("class") for each in chart.iter("rect")] == [
        *("part-a", "part-b", "part-a")
    ]


def test_numbers_are_short():
    figures = (0.1234, 1.0, 12.34, 123.4, 1234.0, 12345.0, 123456.0, 1234567.0)
    assert [short(figure) for figure in figures] == [
        *("0.123", "1", "12.3", "123", "1234", "12.3k", "123k", "1.23M")
    ]
    assert [nice(figure) for figure in (0, 1, 1.1, 30, 81)] == [1, 1, 2, 40, 100]


@pytest.mark.parametrize(
    ("us", "words"),
    [
        (None, "2 virtual cores, kernel"),
        (0, "2 virtual cores that halt at once, kernel"),
        (200, "2 virtual cores that poll 200 us when idle, kernel"),
    ],
)
def test_what_idle_cores_do_is_in_the_heading(us, words):
    assert words in heading({**MACHINE, "idle_poll_us": us})


def test_document_gets_the_parts_that_were_measured():
    found = dict(parts(MACHINE, "today", some_rows(), ["airlock"], [], EXTRAS))
    assert set(found) == {"disk", "devices"}
    assert "| airlock / direct | depth 1 | depth 32 |" in found["disk"]
    assert "| randread-4K | 0.80 (0.80-0.80)? | 0.80 (0.80-0.80)? |" in found["disk"]
    assert "| randread-4K, airlock | 2.00 | 2.00 |" in found["disk"]
    assert "| net | airlock | 0.50 Mpackets/s |" in found["devices"]
    assert "1 pairs of runs" in found["disk"]
    rows = some_rows(ENOUGH)
    disk = dict(parts(MACHINE, "today", rows, ["airlock"], GOALS, []))
    assert "0.80 (0.80-0.80) |" in disk["disk"]
    assert "none: **not met** |" in disk["goals"]


def test_document_has_a_place_for_each_part():
    content = DOCUMENT.read_text()
    for part, _ in parts(MACHINE, "today", some_rows(), ["airlock"], GOALS, EXTRAS):
        once = replaced(content, part, "new \\1 figures")
        assert "new \\1 figures" in once
        assert replaced(once, part, "old") == replaced(content, part, "old")
    assert "new" in replaced(content, f"disk{POLLED}", "new")
    with pytest.raises(BenchError, match="no place for more"):
        replaced(content, "more", "")
