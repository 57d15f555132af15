# SPDX-License-Identifier: Apache-2.0
"""The benchmark's load programs: what they say they did is what the back-end did."""

import json
import re
import time
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path

import pytest

from bench import dirty_log
from bench.against import BEFORE, NOW, SOURCE, measure_both
from bench.fronts import Fronts
from bench.machine import Watched
from bench.measure import what_it_said
from bench.runs import KIB, MIB, BenchError, Case
from bench.start import start, starts
from bench.targets import Counters, nbd_export, through_airlock
from tests.real.airlock import airlock
from tests.real.programs import PROJECT
from tests.real.storage import Disk, storage_daemon
from tests.support.dirty import LogFile

MS = 200
COUNTED = {"read": "rchar", "write": "wchar"}
"""What Linux counts of a process that reads and writes files. Sockets are left out, as
these are used by recvmsg() and sendmsg()."""


def transferred(pid: int, mode: str) -> int:
    """Bytes that a process has read from files, or written to them."""
    name = COUNTED["write" if "write" in mode else "read"]
    found = re.search(rf"^{name}: (\d+)", Path(f"/proc/{pid}/io").read_text(), re.M)
    assert found
    return int(found[1])


@pytest.fixture
def disk(folder: Path) -> Disk:
    path = folder / "disk.img"
    path.write_bytes(bytes(range(256)) * (64 * MIB // 256))
    return Disk(path, queues=2)


@pytest.mark.parametrize(
    "case",
    [
        Case("randread", 4 * KIB, 8),
        Case("randwrite", 64 * KIB, 4, queues=2),
        Case("read", 4 * KIB, 32, indirect=True, cold=True),
        Case("write", MIB, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("front", ["vhost", "nbd"])
def test_load_is_what_the_back_end_gets(programs, folder, disk, front, case):
    fronts = Fronts(programs, folder, MS)
    with ExitStack() as stack:
        daemon, path = stack.enter_context(
            storage_daemon(programs, disk, folder / "back.sock")
        )
        if front == "nbd":
            path = stack.enter_context(nbd_export(daemon, folder / "nbd.sock"))
        before = transferred(daemon.pid, case.mode)
        with getattr(fronts, front)(path, case, busy=False) as load:
            assert load.wait(timeout=60) == 0, load.describe()
            said = what_it_said(load)
        moved = transferred(daemon.pid, case.mode) - before
    measured = said["mb_per_s"] * 1e6 * MS / 1000
    assert said["iops"] * case.size == pytest.approx(said["mb_per_s"] * 1e6, rel=0.01)
    # There was a time before that was not measured.
    assert 0 < measured * 0.95 < moved
    latency = said["latency_us"]
    assert 0 < latency["p50"] <= latency["p99"] <= latency["p999"]
    # Little's law: requests in flight are their rate times their mean latency, which is
    # at least half of the median.
    in_flight = said["iops"] * latency["p50"] / 1e6
    assert in_flight < case.depth * case.queues * 2.2


def test_counters_are_those_of_the_last_session(programs, folder, disk):
    """Each session has a line in the log; the second one had far more kicks."""
    fronts = Fronts(programs, folder, MS)
    front = folder / "front.sock"
    with (
        storage_daemon(programs, disk, folder / "back.sock") as (_, back),
        airlock(back, front, "--poll-us=0", "--log-level=debug") as proxy,
    ):
        counters = Counters(proxy)
        found = []
        for depth in (64, 1):
            case = Case("randread", 4 * KIB, depth, indirect=True)
            with fronts.vhost(front, case, busy=False) as load:
                assert load.wait(timeout=60) == 0, load.describe()
            found.append(counters())
            assert json.loads(load.output())[0]["requests"] > 0
    assert found[0]["airlock kicks"] < found[1]["airlock kicks"]
    assert found[1]["airlock kicks"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("seconds", "runs"), [(600, 8), (0, 2)])
def test_two_builds_run_in_turns(programs, folder, monkeypatch, seconds, runs):
    """Here both are this one. As long as there is time another case begins, and after
    the last one another round; without time there is one pair.
    """
    monkeypatch.setattr("bench.targets.DISK_SIZE", 64 * MIB)
    source = PROJECT / SOURCE
    loads = [Case("randread", 4 * KIB, 8), Case("randwrite", 64 * KIB, 1)]
    failures: list[str] = []
    done: list[str] = []
    until = time.monotonic() + seconds
    both = (source, source)
    measured = measure_both(
        programs, folder, loads, both, 2 * MS, until, failures, done.append
    )
    with closing(measured):
        found = list(islice(measured, 8))
    assert not failures
    order = [BEFORE, NOW, NOW, BEFORE, NOW, BEFORE, BEFORE, NOW]
    assert [run.target for run in found] == order[:runs]
    assert [run.case for run in found[:2]] == loads[:1] * 2
    assert all(set(run.cpu_us) == {"front", "airlock", "back"} for run in found)
    assert done[0].endswith("s left, randread-4K-8")


def test_another_build_than_was_asked_for_is_noticed(programs, folder, disk):
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    with (
        storage_daemon(programs, disk, folder / "back.sock") as (daemon, back),
        pytest.raises(BenchError, match=f"now: an airlock of another .*{elsewhere}"),
        through_airlock(NOW, daemon, back, folder, source=elsewhere),
    ):
        pass


@pytest.mark.timing
def test_log_is_on_in_one_window_of_each_pair(programs, folder, disk, monkeypatch):
    """The bench looks into the log; here it notices that its bits are lost."""
    front = folder / "front.sock"
    with (
        storage_daemon(programs, disk, folder / "back.sock") as (_, back),
        airlock(back, front) as proxy,
    ):
        clock = Watched(proxy.pid)
        with closing(dirty_log.pairs(front, clock, span=0, seconds=60)) as measured:
            for pair in islice(measured, 2):
                assert all(each.rate > 0 < each.cpu_us for each in pair)
            monkeypatch.setattr(LogFile, "take", lambda log: set())
            with pytest.raises(BenchError, match=r"log True: .* and 0 pages"):
                next(measured)


def test_starts_are_measured_until_ready(programs, folder, disk):
    with storage_daemon(programs, disk, folder / "back.sock") as (_, back):
        found = starts(back, folder, rounds=2)
    assert len(found) == 2
    for each in found:
        assert 0 < each.cpu_seconds <= each.seconds * 1.5
        # Python alone has some MiB.
        assert 2 * MIB < each.own < 20 * MIB


def test_a_start_that_fails_is_told(folder):
    (folder / "start.sock").touch()  # another file is where it is to listen
    with pytest.raises(BenchError, match=r"does not start:\n(.|\n)*start\.sock"):
        start(folder / "back.sock", folder)
