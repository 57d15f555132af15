# SPDX-License-Identifier: Apache-2.0
"""Guest memory is written by one function: shown on the source and on compiled code.

All pointers into guest memory are const, and only write_guest() drops that. The record
of chains in flight has note() in the same way, and the dirty log set_bits(). The C
compiler sees each place where const is lost, in a cast or without one, so it is asked
about all modules; what it can't see is a pointer that has been a number in between, so
no source may make one a number.

And when code runs, each store into guest memory is caught as it happens: it is one that
had to come, at the right place and in the right order.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.proof.bench import BUFFERS, COPY, SIZE, Bench, once, pieces_of
from tests.proof.watching import CAN_WATCH, Access, Watcher
from tests.support.dirty import LogFile
from tests.support.plane import PAGE
from tests.support.profiles import SANITIZED
from vhost_airlock.dataplane.pump import POLICIES
from vhost_airlock.peers.ring import DESC_F_WRITE as WRITE

SOURCES = Path(__file__).parents[2] / "src"
DATAPLANE = SOURCES / "vhost_airlock" / "dataplane"
MODULES = sorted(path.stem for path in DATAPLANE.glob("*.pyx"))

FUNCTION = re.compile(r"In function .(\w+).:")
WRITERS = {
    "7regions_write_guest": {"guest_split", "regions"},
    "8inflight_note": {"recorded", "step"},
    "9dirty_log_set_bits": {"guest_split", "regions"},
}
"""The ends of these functions' names in C, and modules in which each is used."""

LOSS = re.compile(r"warning: .*\bdiscards? .const. qualifier")


def losses_of_const(source: Path, folder: Path) -> set[str]:
    """The C functions of a Cython source in which a pointer to const gets another."""
    c = folder / f"{source.stem}.c"
    cython = [sys.executable, "-m", "cython", "-3", "-I", str(SOURCES)]
    subprocess.run([*cython, "-o", str(c), str(source)], check=True)
    warnings = "-Wcast-qual", "-Wdiscarded-qualifiers"
    # What Python's own headers do is not looked at.
    headers = "-isystem", sysconfig.get_paths()["include"]
    gcc = ["gcc", "-fsyntax-only", "-O1", *warnings, *headers, str(c)]
    done = subprocess.run(gcc, check=True, capture_output=True, text=True)
    function = ""
    found = set()
    for line in done.stderr.splitlines():
        if entered := FUNCTION.search(line):
            function = entered[1]
        elif LOSS.search(line):
            found.add(function)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_only_one_function_drops_const(name: str, tmp_path: Path) -> None:
    found = losses_of_const(DATAPLANE / f"{name}.pyx", tmp_path)
    assert all(function.endswith(tuple(WRITERS)) for function in found)
    for end, users in WRITERS.items():
        if name in users:
            assert any(function.endswith(end) for function in found), end


LOSING = """
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy
from vhost_airlock.dataplane.regions cimport Region

cdef void by_a_cast(Region *region) noexcept nogil:
    (<uint8_t *> region.host)[0] = 1

cdef extern from *:
    '''
    static void takes(void *to) { (void)to; }
    '''
    void takes(const void *to) nogil

cdef void by_a_call(Region *region) noexcept nogil:
    takes(region.host)

cdef uint8_t in_order(Region *region) noexcept nogil:
    return region.host[0]
"""


def test_a_loss_of_const_is_seen(tmp_path: Path) -> None:
    """The test of the test."""
    source = tmp_path / "losing.pyx"
    source.write_text(LOSING)
    found = losses_of_const(source, tmp_path)
    names = {function.removeprefix("__pyx_f_6losing_") for function in found}
    assert {name for name in names if not name.endswith(tuple(WRITERS))} == {
        "by_a_cast",
        "by_a_call",
    }


def test_no_pointer_becomes_a_number() -> None:
    """But one: where a mapping begins, which the control plane has to know."""
    found = [
        f"{path.name}: {line.strip()}"
        for path in sorted(DATAPLANE.glob("*.p[xy]*"))
        for line in path.read_text().splitlines()
        if re.search(r"<\s*u?intptr_t\s*>", line)
    ]
    assert found == ["mapping.pyx: self.address = <uintptr_t> start + before"]


@pytest.fixture(scope="module")
def watcher(tmp_path_factory: pytest.TempPathFactory) -> Watcher:
    return Watcher(tmp_path_factory.mktemp("watch"))


@pytest.mark.skipif(not CAN_WATCH, reason="reads instructions of x86-64 only")
@pytest.mark.skipif(SANITIZED, reason="the code that users run is what is looked at")
@pytest.mark.parametrize("event_idx", [True, False], ids=["event", "flags"])
class TestStores:
    """Every store into guest memory, and what it was for."""

    @pytest.fixture
    def bench(self, watcher: Watcher, event_idx: bool) -> Bench:
        return Bench(watcher, guest_event_idx=event_idx, back_event_idx=event_idx)

    def test_before_sleep_the_guest_is_asked_for_kicks(
        self, bench: Bench, event_idx: bool
    ) -> None:
        stores = bench.stores(bench.lane.pump.rest)
        word = "guest avail_event" if event_idx else "guest used.flags"
        assert bench.words(stores) == [(word, 2)]
        assert not bench.copied(stores)
        assert bench.stores(bench.lane.pump.rest) == []

    def test_a_chain_on_its_way_to_the_back_only_stops_kicks(
        self, bench: Bench, event_idx: bool
    ) -> None:
        bench.lane.pump.rest()
        bench.offer(0, WRITE)
        stores = bench.stores(bench.lane.step)
        assert bench.words(stores) == ([] if event_idx else [("guest used.flags", 2)])
        assert not bench.copied(stores)

    def test_a_completion_is_data_then_elements_then_the_index(
        self, bench: Bench, event_idx: bool
    ) -> None:
        lane = bench.lane
        for position in range(0, 2 * SIZE, 2):
            bench.offer(0, WRITE, WRITE)
            lane.offer((BUFFERS + 8 * PAGE, COPY, True))
            lane.step()
            for size in 2 * COPY, COPY:
                lane.complete(lane.take(), b"x" * size)
            stores = bench.stores(lane.step)
            first, second = (
                (f"guest used.ring[{(position + i) % SIZE}].id", 8) for i in range(2)
            )
            assert bench.words(stores) == [first, second, ("guest used.idx", 2)]
            assert bench.copied(stores) == once(*map(bench.buffer, (1, 2, 8)))
            at = {bench.names.get(each.address): i for i, each in enumerate(stores)}
            assert_before(stores, bench.buffer(1), at[first[0]])
            assert_before(stores, bench.buffer(2), at[first[0]])
            assert_before(stores, bench.buffer(8), at[second[0]])
            lane.used()

    def test_after_a_stop_whoever_comes_next_gets_kicks(
        self, bench: Bench, event_idx: bool
    ) -> None:
        lane = bench.lane
        bench.offer(WRITE)
        lane.step()
        chain = lane.take()
        stores = bench.stores(lambda: lane.stop(1))
        word = "guest avail_event" if event_idx else "guest used.flags"
        assert bench.words(stores) == [(word, 2)]
        assert not bench.copied(stores)
        # And then nothing, until the ring is started once more.
        lane.complete(chain, b"x" * COPY)
        for nothing in (lane.step, lane.pump.rest, lane.pump.look_back):
            assert bench.stores(nothing) == []

    @pytest.mark.parametrize("by", ["offered again", "behind the base"])
    def test_what_came_back_late_is_written_when_the_ring_goes_on(
        self, bench: Bench, event_idx: bool, by: str
    ) -> None:
        lane = bench.lane
        bench.offer(WRITE)
        lane.offer((BUFFERS + PAGE, COPY, True))
        lane.step()
        late, other = lane.take(), lane.take()
        if by == "behind the base":
            lane.complete(other)
            lane.step()
        base, _, _ = lane.stop(2)
        lane.complete(late, b"x" * COPY)
        calls: list[Callable[[], object]] = [lambda: lane.start(base), lane.step]
        stores = [bench.stores(call) for call in calls]
        now = by == "offered again"
        element = f"guest used.ring[{int(not now)}].id"
        assert bench.words(stores[now])[:2] == [(element, 8), ("guest used.idx", 2)]
        assert bench.copied(stores[now]) == once(bench.buffer(0))
        assert bench.words(stores[not now]) == []
        assert not bench.copied(stores[not now])


def assert_before(stores: list[Access], buffer: range, position: int) -> None:
    """All stores into this buffer came before the one at this position."""
    assert all(i < position for i, each in enumerate(stores) if each.address in buffer)


@pytest.mark.skipif(not CAN_WATCH, reason="reads instructions of x86-64 only")
@pytest.mark.skipif(SANITIZED, reason="the code that users run is what is looked at")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("said", [0, 64, COPY + 64])
def test_each_copy_policy_writes_what_it_says(
    watcher: Watcher, policy: str, said: int
) -> None:
    """Of two buffers, the last of them small."""
    bench = Bench(watcher, policy=policy)
    lane = bench.lane
    lane.offer((BUFFERS, COPY, True), (BUFFERS + PAGE, 64, True))
    lane.step()
    lane.complete(lane.take(), b"x" * said)
    stores = bench.stores(lane.step)
    first = COPY if policy == "full" else min(said, COPY)
    last = 0 if policy == "used" and said <= COPY else 64
    expected = {*bench.buffer(0)[:first], *bench.buffer(1)[:last]}
    assert set(bench.copied(stores)) == expected


@pytest.mark.skipif(not CAN_WATCH, reason="reads instructions of x86-64 only")
@pytest.mark.skipif(SANITIZED, reason="the code that users run is what is looked at")
def test_a_page_is_marked_after_the_last_store_to_it(watcher: Watcher) -> None:
    """The VMM sends a page once it has its bit: no store may come later."""
    bench = Bench(watcher)
    lane = bench.lane
    with closing(LogFile(PAGE)) as log:  # it has bits for the buffers, not for the ring
        bench.world.log_into(log)
        pieces = [*pieces_of(bench.world.ram), log.place]
        bench.offer(WRITE, WRITE)
        lane.step()
        lane.complete(lane.take(), b"x" * 2 * COPY)
        accesses = watcher.during(lane.step, pieces)
        stores = [each for each in accesses if each.write]
        bits = log.place[0] + BUFFERS // PAGE // 8
        marks = [i for i, each in enumerate(stores) if each.address == bits]
        assert len(marks) == 2
        assert_before(stores, bench.buffer(0), marks[0])
        assert_before(stores, bench.buffer(1), marks[1])
        element = next(
            i
            for i, each in enumerate(stores)
            if bench.names.get(each.address) == "guest used.ring[0].id"
        )
        assert marks[1] < element
        assert log.take() == {BUFFERS // PAGE, BUFFERS // PAGE + 1}


@pytest.mark.skipif(not CAN_WATCH, reason="reads instructions of x86-64 only")
@pytest.mark.skipif(SANITIZED, reason="the code that users run is what is looked at")
def test_a_fault_of_either_side_writes_nothing(watcher: Watcher) -> None:
    for breaks in ("guest", "back"):
        bench = Bench(watcher)
        lane = bench.lane
        if breaks == "guest":
            lane.ring.avail_idx = SIZE + 1
        else:
            lane.shadow.used_idx = SIZE + 1
        assert bench.stores(lane.step) == []
        assert lane.fault
        assert bench.stores(lane.pump.rest) == []
