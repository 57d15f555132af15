# SPDX-License-Identifier: Apache-2.0
"""`vhost-airlock bench`: its arguments, its arithmetic, and the whole of it once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhost_airlock.cli import main as cli
from vhost_airlock.cli.bench import plans_of
from vhost_airlock.cli.bench_report import Measured, Spread, label, ratios, table, unit
from vhost_airlock.peers.blk_load import LoadPlan, LoadResult
from vhost_airlock.peers.blk_process import BlkProcess
from vhost_airlock.peers.ram import MIB

PLAN = LoadPlan(depth=32)
PATHS = ["/airlock.sock", "/back.sock"]


def plans(*arguments: str) -> list[LoadPlan]:
    return plans_of(cli.parse(["bench", "--socket-path=/back", *arguments]))


def result(requests: int, latency: int = 100_000) -> LoadResult:
    return LoadResult(
        begin_ns=0,
        seconds=1.0,
        size=4096,
        indirect=True,
        requests=requests,
        kicks=requests // 10,
        calls=requests // 4,
        sleeps=0,
        cpu_ns=requests * 2000,
        slowest_ns=latency,
        latencies={latency: requests},
    )


def measured(device: list[int], compared: list[int]) -> list[Measured]:
    return [
        Measured(PLAN, path, number, result(requests))
        for path, figures in zip(PATHS, (device, compared), strict=True)
        for number, requests in enumerate(figures)
    ]


def test_loads_are_all_combinations():
    found = plans("--mode=read,randwrite", "--size=512,1M", "--depth=1,2")
    assert [(plan.mode, plan.size, plan.depth) for plan in found] == [
        (mode, size, depth)
        for mode in ("read", "randwrite")
        for size in (512, MIB)
        for depth in (1, 2)
    ]


def test_nothing_is_written_unless_it_is_asked_for():
    assert {plan.mode for plan in plans()} == {"randread"}


def test_options_are_those_of_the_load():
    (plan,) = plans(
        *("--size=64K", "--depth=8", "--queues=2", "--no-indirect", "--busy-wait"),
        *("--segment=4K", "--span=256M", "--ram=1T", "--seconds=0.25"),
    )
    assert plan == LoadPlan(
        "randread",
        65536,
        8,
        queues=2,
        indirect=False,
        busy_wait=True,
        segment=4096,
        span=256 * MIB,
        ram=1 << 40,
        seconds=0.25,
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--socket-path"),
        (["--mode=trim"], "trim: none of randread, randwrite, read, write"),
        (["--size=4K,"], ": no size from 512 to 16T"),
        (["--size=100"], "100: no size"),
        (["--depth=0"], "0: no number from 1 to 1024"),
        (["--depth=1,x"], "x: no number"),
        (["--depth=1000"], "1000 requests don't fit"),
        (["--size=1000"], "1000 bytes are no whole sectors"),
        (["--segment=1000"], "can't cut"),
        (["--seconds=0"], "0: no number of seconds"),
        (["--seconds=nan"], "nan: no number of seconds"),
        (["--rounds=0"], "0: no number"),
    ],
)
def test_arguments_that_make_no_sense(capsys, arguments, said):
    path = ["--socket-path=/nowhere"] if arguments else []
    assert cli.main(["bench", *path, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vhost-airlock: ")
    assert said in error
    assert error.count("\n") == 1


def test_device_that_is_not_there(capsys):
    assert cli.main(["bench", "--socket-path=/nowhere"]) == 1
    assert "/nowhere" in capsys.readouterr().err


def test_ratios_are_paired_by_round():
    """The machine got slower from round to round; the ratio stays what it is."""
    found = ratios(measured([90, 45, 9], [100, 50, 10]), PLAN, PATHS)
    assert (found.median, found.low, found.high) == pytest.approx((0.9, 0.9, 0.9))


def test_ratio_leaves_out_rounds_that_are_not_complete():
    assert ratios(measured([120, 60, 80, 1], [100, 100, 100]), PLAN, PATHS) == Spread(
        0.8, 0.6, 1.2
    )


def test_table_has_medians():
    head, device, compared, _ = table(
        measured([120, 60, 80], [100, 100, 100]), PATHS
    ).splitlines()
    assert "IOPS" in head
    assert " ".join(device.split()) == (
        "randread 4K x 32 device 80 0 100.0 100.0 100.0 2.00 0.100 0.250"
        " 0.80 (0.60-1.20)"
    )
    assert compared.split()[:2] == ["compared", "100"]
    assert not compared.endswith(")")


def test_names_of_sizes():
    assert [unit(size) for size in (512, 4096, 65536, MIB, MIB + 512)] == [
        "512",
        "4K",
        "64K",
        "1M",
        str(MIB + 512),
    ]
    assert label(PLAN) == "randread 4K x 32"


@pytest.fixture
def back(tmp_path: Path) -> Iterator[str]:
    image = tmp_path / "disk.img"
    image.touch()
    os.truncate(image, MIB)
    with BlkProcess(str(image), str(tmp_path / "blk.sock")) as process:
        yield process.path


def test_two_ways_to_a_device(back, tmp_path, capsys):
    other = tmp_path / "other.sock"
    other.symlink_to(back)
    paths = [f"--socket-path={back}", f"--compare={other}"]
    quick = ["--size=4K", "--depth=1,4", "--rounds=2", "--seconds=0.05"]
    assert cli.main(["bench", *paths, *quick, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    order = [(each["round"], each["load"]["depth"], each["socket"]) for each in found]
    assert order == [
        (0, 1, back),
        (0, 1, str(other)),
        (0, 4, str(other)),
        (0, 4, back),
        (1, 1, str(other)),
        (1, 1, back),
        (1, 4, back),
        (1, 4, str(other)),
    ]
    assert all(each["requests"] > 0 for each in found)

    assert cli.main(["bench", *paths, *quick]) == 0
    said = capsys.readouterr().out
    assert f"device: {back}\ncompared: {other}\n" in said
    assert "randread 4K x 4" in said
