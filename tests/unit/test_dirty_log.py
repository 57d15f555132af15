# SPDX-License-Identifier: Apache-2.0
"""The dirty log: which pages are marked, and by which stores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.support.dirty import LogFile, pages_of
from tests.support.plane import MIB, PAGE, Lane, Record, World

RING = 16 * MIB
"""Guest-physical address of the ring: low, so that a log needn't be large."""
END = RING + MIB


@pytest.fixture
def world() -> World:
    return World(rings_at=RING)


@pytest.fixture
def log() -> Iterator[LogFile]:
    with closing(LogFile.up_to(END)) as log:
        yield log
        assert log.intact()


def used_page(lane: Lane, offset: int = 0) -> int:
    """The page of this byte of the used ring."""
    return (lane.ring_at + lane.layout.used + offset) // PAGE


def complete_all(lane: Lane) -> None:
    """All offered chains go to the back, are done, and come back."""
    lane.step()
    while chain := lane.device.take():
        lane.complete(chain)
    lane.step()


def marked_by(lane: Lane, log: LogFile, *buffers: tuple[int, int]) -> set[int]:
    """The pages that a chain with these buffers to write marks beside the ring's."""
    for address, size in buffers:
        lane.offer((address, size, True))
    complete_all(lane)
    return log.take() - {used_page(lane)}


@pytest.mark.parametrize(
    ("address", "size"),
    [
        (0, 1),
        (PAGE - 1, 1),
        (PAGE - 1, 2),
        (PAGE, PAGE),
        (7 * PAGE, 2 * PAGE),  # over the end of a byte
        (63 * PAGE + 9, PAGE),  # over the end of a word
        (5 * PAGE + 1, 62 * PAGE),
        (3 * PAGE + 4095, 64 * PAGE + 2),
        (64 * PAGE, 64 * PAGE),
        (64 * PAGE, 65 * PAGE - 1),
        (1 * PAGE, 200 * PAGE),
        (MIB, MIB),
        (2 * MIB - 5, 10),  # in two regions
    ],
)
@pytest.mark.parametrize("offset", [0, 1, 4, 8, 4095])
def test_exactly_the_pages_of_a_buffer_are_marked(world, address, size, offset):
    """Wherever the log begins in its file: not every byte of it is a word's first."""
    lane = Lane(world)
    with closing(LogFile.up_to(END, offset)) as log:
        world.log_into(log)
        log.take()
        assert marked_by(lane, log, (address, size)) == pages_of([(address, size)])
        assert log.intact()


@pytest.mark.parametrize("offset", [0, 3])
def test_bits_of_others_stay(world, offset):
    """A log is shared with other devices."""
    lane = Lane(world)
    with closing(LogFile.up_to(END, offset)) as log:
        log.bits[: 2 * MIB // PAGE // 8] = bytes([0b10000001]) * (2 * MIB // PAGE // 8)
        before = {page for page in range(2 * MIB // PAGE) if page % 8 in (0, 7)}
        world.log_into(log)
        marked = marked_by(lane, log, (3 * PAGE, 130 * PAGE))
        assert marked == before | set(range(3, 133))


def test_chains_of_many_buffers_mark_each_of_them(world, log):
    lane = Lane(world)
    world.log_into(log)
    log.take()
    buffers = [(PAGE * i + 5, 100) for i in range(0, 40, 4)]
    lane.offer((MIB, 700), *[(*buffer, True) for buffer in buffers], indirect=True)
    complete_all(lane)
    assert log.take() == pages_of(buffers) | {used_page(lane)}


def test_buffers_that_the_device_reads_are_not_marked(world, log):
    lane = Lane(world)
    world.log_into(log)
    log.take()
    lane.offer((0, 5000))
    complete_all(lane)
    assert log.take() == {used_page(lane)}


@pytest.mark.parametrize("policy", ["full", "used", "used+tail"])
@pytest.mark.parametrize("said", [0, 1, PAGE, PAGE + 1, 3 * PAGE, 9 * PAGE])
def test_what_the_policy_writes_is_marked(world, log, policy, said):
    """And no more: also when the back says less than it has written, or too much."""
    lane = Lane(world, policy=policy)
    world.log_into(log)
    log.take()
    lane.offer((0, PAGE, True), (8 * PAGE, 2 * PAGE, True), (12 * PAGE, 1, True))
    lane.step()
    lane.complete(lane.take(), length=said)
    lane.step()
    all_of_it = [(0, PAGE), (8 * PAGE, 2 * PAGE), (12 * PAGE, 1)]
    written = pages_of(all_of_it)
    if policy != "full":
        left, found = said, []
        for address, size in all_of_it:
            found.append((address, min(left, size)))
            left -= found[-1][1]
        if policy == "used+tail":
            found[-1] = all_of_it[-1]
        written = pages_of(found)
    assert log.take() == written | {used_page(lane)}


def test_descriptors_without_length_mark_nothing(world, log):
    """CVE-2019-14835: their pages may be anywhere."""
    lane = Lane(world)
    world.log_into(log)
    log.take()
    lane.offer((0, 0, True), (PAGE, 10, True), (0xFFFF_FFFF_FFFF_F000, 0, True))
    lane.offer((5 * PAGE, 0, True), (6 * PAGE, 10, True), indirect=True)
    complete_all(lane)
    assert log.take() == {1, 6, used_page(lane)}
    assert lane.counter("unlogged") == 0


def test_a_large_used_ring_is_marked_page_by_page(world, log):
    """1024 elements, their index before and the event index behind them: 3 pages."""
    lane = Lane(world, size=1024)
    offset_of_last = 4 + 8 * 1024
    assert used_page(lane, offset_of_last) == used_page(lane) + 2
    world.log_into(log)
    lane.pump.rest()
    assert log.take() == {used_page(lane), used_page(lane, offset_of_last)}
    for i in range(1024):
        lane.offer((0, 1, True))
        complete_all(lane)
        lane.used()
        element = lane.ring_at + lane.layout.used + 4 + 8 * i
        assert log.take() == {0, used_page(lane)} | pages_of([(element, 8)])
    assert lane.pump.rest() is False
    assert log.take() == {used_page(lane, offset_of_last)}


def test_flags_of_the_used_ring_are_marked(world, log):
    lane = Lane(world, guest_event_idx=False)
    world.log_into(log)
    lane.pump.rest()
    log.take()
    lane.offer((0, 10))
    lane.step()  # no kicks wanted any more
    assert log.take() == {used_page(lane)}
    lane.pump.rest()  # kicks wanted
    assert log.take() == {used_page(lane)}


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("buffers", [False, True])
def test_words_and_buffers_are_logged_apart(world, log, words, buffers):
    lane = Lane(world)
    world.log_into(log, words=words, buffers=buffers)
    lane.offer((5 * PAGE, 10, True))
    complete_all(lane)
    lane.pump.rest()
    ring = {used_page(lane)} if words else set()
    assert log.take() == ring | ({5} if buffers else set())


def test_without_a_log_nothing_is_marked(world, log):
    lane = Lane(world)
    world.log_into(log, words=False, buffers=False)
    lane.offer((5 * PAGE, 10, True))
    complete_all(lane)
    assert lane.counter("logged") == 0
    assert not any(log.bits)


def test_a_new_log_takes_the_place_of_the_old_one(world, log):
    lane = Lane(world)
    world.log_into(log)
    lane.offer((5 * PAGE, 10, True))
    lane.offer((6 * PAGE, 10, True))
    lane.step()
    late = lane.take()
    lane.complete(lane.take())
    lane.step()
    log.take()
    with closing(LogFile.up_to(END, 40)) as new:
        world.log_into(new)
        lane.complete(late)
        lane.step()
        assert log.take() == set()
        assert new.take() == {5, used_page(lane)}


class TestCarriedOver:
    """A log that the VMM has left may have bits that it will look for in the next."""

    @pytest.mark.parametrize(("old_at", "new_at"), [(0, 0), (3, 8), (8, 5)])
    def test_bits_of_both_are_there(self, world, old_at, new_at):
        with (
            closing(LogFile(100, old_at)) as old,
            closing(LogFile(100, new_at)) as new,
        ):
            old.bits[0], old.bits[1], old.bits[99] = 0b10000001, 0b11111111, 0b10000000
            new.bits[0], new.bits[2] = 0b00000011, 0b00010000
            world.memory.set_log(*new.place)
            assert world.memory.carry_over(*old.place)
            assert new.take() == {0, 1, 7, *range(8, 16), 20, 799}
            assert old.take() == {0, 7, *range(8, 16), 799}
            assert old.intact()
            assert new.intact()

    @pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3)])
    def test_as_many_as_both_have_room_for(self, world, before, after):
        with closing(LogFile(before)) as old, closing(LogFile(after)) as new:
            old.bits[:] = b"\xff" * before
            world.memory.set_log(*new.place)
            assert world.memory.carry_over(*old.place)
            assert new.take() == set(range(16))
            assert new.intact()

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_log_that_was_cut_short(self, world, which):
        with closing(LogFile(2)) as old, closing(LogFile(2)) as new:
            old.bits[:] = b"\xff\xff"
            world.memory.set_log(*new.place)
            place = old.place
            (old, new)[which].cut()
            assert not world.memory.carry_over(*place)


class TestWordsOfBefore:
    """A store to the ring may have come before the log, or before its bit if another
    airlock was killed between the two: so the index is written once more, as it is.
    """

    def test_a_new_log_gets_the_index(self, world, log):
        lane = Lane(world)
        lane.offer((5 * PAGE, 10, True))
        complete_all(lane)
        before = lane.ring.used_idx
        world.log_into(log)
        assert log.take() == {used_page(lane)}
        assert lane.ring.used_idx == before == 1

    def test_a_start_writes_the_index(self, world, log):
        lane = Lane(world, base=7)
        lane.stop(0)
        world.log_into(log)
        assert log.take() == set()
        lane.ring.used_idx = 7
        lane.start(7)
        assert log.take() == {used_page(lane)}
        assert lane.ring.used_idx == 7

    def test_a_new_log_gets_the_event_index(self, world, log):
        lane = Lane(world, size=1024)
        lane.offer((0, 10))
        lane.step()
        lane.pump.rest()
        world.log_into(log)
        assert log.take() == {used_page(lane), used_page(lane, 4 + 8 * 1024)}
        assert lane.ring.avail_event == 1

    def test_a_ring_that_is_gone_is_not_written(self, world, log):
        lane = Lane(world)
        lane.pump.move(None)
        world.ram.pieces[lane.ring_at].cut()
        world.log_into(log)
        assert log.take() == set()
        assert lane.fault == "the ring's own memory is not there any more"


class TestShort:
    """The log has no bits for some pages: the VMM's mistake, which is counted."""

    def test_pages_beyond_it_are_skipped_and_counted(self, world):
        lane = Lane(world)
        with closing(LogFile(2)) as log:  # 16 pages
            world.log_into(log)
            counted = lane.counter("unlogged")
            assert counted > 0  # the used index
            assert marked_by(lane, log, (14 * PAGE, 5 * PAGE)) == {14, 15}
            # Three pages of the buffer, an element, the index.
            assert lane.counter("unlogged") == counted + 5
            assert marked_by(lane, log, (16 * PAGE, 64 * PAGE)) == set()
            assert lane.counter("unlogged") == counted + 5 + 66
            assert log.intact()

    def test_whole_words_end_with_the_log(self, world):
        lane = Lane(world)
        with closing(LogFile(8 * 2 + 1)) as log:  # 136 pages
            world.log_into(log)
            assert marked_by(lane, log, (0, MIB)) == set(range(136))
            assert log.intact()

    def test_nothing_wraps_round_at_the_end_of_all_addresses(self, log):
        top = (1 << 64) - 2 * MIB
        world = World(regions=[(0, MIB), (top, 2 * MIB)], rings_at=RING)
        lane = Lane(world)
        world.log_into(log)
        log.take()
        last = (1 << 64) - PAGE
        assert marked_by(lane, log, (last, PAGE - 1), (top, 2 * MIB - 1)) == set()
        assert lane.counter("unlogged") == 1 + 2 * MIB // PAGE
        assert lane.fault is None


class TestLost:
    """The log's file was cut short."""

    @pytest.fixture
    def log(self) -> Iterator[LogFile]:
        with closing(LogFile.up_to(END)) as log:
            yield log

    def test_the_ring_stops_and_the_process_goes_on(self, world, log):
        lane, other = Lane(world), Lane(world)
        world.log_into(log)
        lane.offer((5 * PAGE, 10, True))
        lane.step()
        lane.complete(lane.take())
        log.cut()
        lane.step()
        assert lane.fault == (
            "a page of memory that the ring or a request is in can't be had"
        )
        other.pump.set_logging(words=False, buffers=False)
        other.offer((6 * PAGE, 10, True))
        complete_all(other)
        assert len(other.used()) == 1

    def test_a_start_with_such_a_log(self, world, log):
        lane = Lane(world)
        lane.stop(0)
        world.log_into(log)
        log.cut()
        lane.start(0)
        assert lane.fault is not None


def test_a_stop_marks_its_last_store_and_no_later_one(world, log):
    lane = Lane(world)
    world.log_into(log)
    for i in range(3):
        lane.offer((i * PAGE, 10, True))
    lane.step()
    late = [lane.take() for _ in range(3)]
    log.take()
    lane.stop(3)
    assert log.take() == {used_page(lane)}  # the next device is kicked
    for chain in late:
        lane.complete(chain, b"late")
    lane.pump.look_back()
    lane.step()
    lane.pump.rest()
    assert log.take() == set()


def test_what_came_back_late_is_marked_when_the_ring_goes_on(world, log):
    lane = Lane(world)
    world.log_into(log)
    for i in range(2):
        lane.offer((i * PAGE, 10, True))
    lane.step()
    late, other = lane.take(), lane.take()
    lane.complete(other)
    lane.step()
    base, _, _ = lane.stop(2)
    lane.complete(late, b"late")
    log.take()
    lane.start(base)
    lane.step()
    assert log.take() == {0, used_page(lane)}
    assert world.ram.read(0, 4) == b"late"


def test_the_record_of_chains_in_flight_is_not_logged(world, log):
    """It is no memory of the guest."""
    lane = Lane(world, record=Record(16))
    world.log_into(log)
    log.take()
    lane.offer((5 * PAGE, 10, True))
    complete_all(lane)
    assert log.take() == {5, used_page(lane)}


def test_counters(world, log):
    lane = Lane(world)
    world.log_into(log)
    before = lane.counter("logged")
    lane.offer((5 * PAGE, 3 * PAGE, True))
    complete_all(lane)
    # Three pages of the buffer, an element, the index.
    assert lane.counter("logged") == before + 5
    assert lane.counter("unlogged") == 0
