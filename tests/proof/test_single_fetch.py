# SPDX-License-Identifier: Apache-2.0
"""Words that another side can write are fetched once: proved on the compiled code.

Every load of the data plane from guest and isolated memory is caught as it happens, by
the closed memory of watching.py, and the whole list is compared with what a step has
to look at, word by word, in order. So a second fetch of anything fails here, and so
does a fetch in pieces, whether it stands in the source or the compiler made it.

Bytes that are only copied (buffers, indirect tables) come by memcpy. For many lengths
it loads some bytes twice, at the seam of two overlapping loads; nothing looks at them
in between. Copies here have 128 bytes, where no memcpy of glibc has a seam.
"""

from __future__ import annotations

import ctypes

import pytest

from tests.proof.bench import BUFFERS, COPY, SIZE, Bench, once
from tests.proof.watching import CAN_WATCH, Access, Watcher, width_of
from tests.support.plane import PAGE, Memory
from tests.support.profiles import SANITIZED
from vhost_airlock.peers.ring import (
    DESC,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
)

pytestmark = [
    pytest.mark.skipif(not CAN_WATCH, reason="reads instructions of x86-64 only"),
    pytest.mark.skipif(
        SANITIZED, reason="the code that users run is what is looked at"
    ),
]

NEXT, WRITE, INDIRECT = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT


@pytest.fixture(scope="module")
def watcher(tmp_path_factory):
    return Watcher(tmp_path_factory.mktemp("watch"))


def halves(*numbers: int) -> list[tuple[str, int]]:
    """The loads of whole descriptors of the guest's ring, in two words each."""
    return [
        (f"guest desc[{number}] {half} half", 8)
        for number in numbers
        for half in ("first", "second")
    ]


EVENTS = pytest.mark.parametrize("event_idx", [True, False], ids=["event", "flags"])


@EVENTS
def test_a_chain_on_its_way_to_the_back(watcher, event_idx):
    bench = Bench(watcher, guest_event_idx=event_idx, back_event_idx=event_idx)
    for position in range(2 * SIZE):
        head = bench.offer(0, 0, WRITE)
        numbers = [head]
        while (desc := bench.lane.ring.read_desc(numbers[-1])).flags & NEXT:
            numbers.append(desc.next)

        loads = bench.loads(bench.lane.step)

        assert bench.words(loads) == [
            ("shadow used.idx", 2),
            ("guest avail.idx", 2),
            (f"guest avail.ring[{position % SIZE}]", 2),
            *halves(*numbers),
            ("guest avail.idx", 2),  # are there more?
            ("shadow avail_event" if event_idx else "shadow used.flags", 2),
        ]
        assert bench.copied(loads) == once(bench.buffer(0), bench.buffer(1))
        bench.lane.complete(bench.lane.take())
        bench.lane.step()
        assert bench.lane.used() == [(head, 0)]


@pytest.mark.parametrize("direct", [0, 2], ids=["all", "after-two-direct"])
def test_a_chain_in_an_indirect_table(watcher, direct):
    bench = Bench(watcher)
    lane = bench.lane
    buffers = [(BUFFERS + PAGE * i, COPY, i == 7 + direct) for i in range(8 + direct)]
    lane.offer(*buffers, indirect=True, direct=direct)
    head = lane.ring.avail_entry(0)
    numbers = [head]
    while (desc := lane.ring.read_desc(numbers[-1])).flags & NEXT:
        numbers.append(desc.next)
    assert len(numbers) == 1 + direct
    assert desc.length == COPY
    table = lane.world.ram.host(desc.addr)

    loads = bench.loads(lane.step)

    assert bench.words(loads) == [
        ("shadow used.idx", 2),
        ("guest avail.idx", 2),
        ("guest avail.ring[0]", 2),
        *halves(*numbers),
        ("guest avail.idx", 2),
        ("shadow avail_event", 2),
    ]
    readable = [bench.buffer(i) for i in range(7 + direct)]
    assert bench.copied(loads) == once(range(table, table + COPY), *readable)


@EVENTS
def test_a_completion_on_its_way_to_the_guest(watcher, event_idx):
    bench = Bench(watcher, guest_event_idx=event_idx, back_event_idx=event_idx)
    lane = bench.lane
    for position in range(2 * SIZE):
        head = bench.offer(0, WRITE, WRITE)
        lane.step()
        chain = lane.take()
        doubles = [
            range(start := lane.world.isolated.host(buffer.addr), start + buffer.length)
            for buffer in chain.buffers
            if buffer.writable
        ]
        lane.complete(chain, b"x" * 2 * COPY)

        loads = bench.loads(lane.step)

        # With EVENT_IDX the very first completion calls without a look.
        event = [("guest used_event", 2)] if position else []
        assert bench.words(loads) == [
            ("shadow used.idx", 2),
            (f"shadow used.ring[{position % SIZE}].id", 4),
            (f"shadow used.ring[{position % SIZE}].len", 4),
            ("shadow used.idx", 2),  # are there more?
            *(event if event_idx else [("guest avail.flags", 2)]),
            ("guest avail.idx", 2),
        ]
        assert bench.copied(loads) == once(*doubles)
        assert lane.used() == [(head, 2 * COPY)]


def test_a_large_buffer_is_copied_once(watcher):
    """One that lies in two regions, and has a block of the pool as its double."""
    bench = Bench(watcher)
    lane = bench.lane
    border = 2 << 20
    half = 512
    lane.offer((border - half, 2 * half), (BUFFERS, 2 * half, True))

    loads = bench.loads(lane.step)

    for address in border - half, border:
        assert_copied_once(loads, lane.world.ram.host(address), half)
    chain = lane.take()
    lane.complete(chain, b"x" * 2 * half)

    loads = bench.loads(lane.step)

    double = lane.world.isolated.host(chain.buffers[1].addr)
    assert_copied_once(loads, double, 2 * half)


def assert_copied_once(loads: list[Access], start: int, length: int) -> None:
    """All bytes came, and no instruction loaded from any address a second time."""
    whole = range(start, start + length)
    here = [load for load in loads if load.address in whole]
    assert {byte for load in here for byte in load.bytes} == {*whole}
    assert len({(load.address, load.instruction) for load in here}) == len(here)


@EVENTS
def test_before_sleep(watcher, event_idx):
    """Asking for notifications looks at each index once, and at nothing else."""
    bench = Bench(watcher, guest_event_idx=event_idx, back_event_idx=event_idx)
    bench.lane.step()

    loads = bench.loads(bench.lane.pump.rest)

    indices = [("shadow used.idx", 2), ("guest avail.idx", 2)]
    assert bench.words(loads) == indices
    assert not bench.copied(loads)


def test_how_far_the_back_has_come(watcher):
    bench = Bench(watcher)
    bench.offer(0)
    bench.lane.step()
    assert bench.words(bench.loads(lambda: bench.lane.pump.drained)) == [
        ("shadow avail_event", 2),
        ("shadow used.idx", 2),  # all is done that was fetched: has more come?
    ]
    assert bench.words(bench.loads(lambda: bench.lane.pump.tells)) == [
        ("shadow avail_event", 2)
    ]


TABLE = 1 << 40 | 0x1000
"""Where the lane has its indirect tables."""

FAULTY = {
    # Descriptors from 0 on, and how many of them are looked at.
    "next": ([(BUFFERS, COPY, NEXT, SIZE)], 1),
    "address": ([(BUFFERS, COPY, NEXT, 1), (5 << 20, COPY, 0, 0)], 2),
    "order": ([(BUFFERS, COPY, WRITE | NEXT, 1), (BUFFERS, COPY, 0, 0)], 2),
    "empty": ([(BUFFERS, 0, NEXT, 1), (BUFFERS, 0, 0, 0)], 2),
    "table-and-next": ([(TABLE, COPY, INDIRECT | NEXT, 1)], 1),
    "table-length": ([(TABLE, COPY - 1, INDIRECT, 0)], 1),
    "table-address": ([(5 << 20, COPY, INDIRECT, 0)], 1),
    "nested": ([(TABLE, COPY, INDIRECT, 0)], 1),
}


@pytest.mark.parametrize("case", FAULTY)
def test_what_is_faulty_is_not_looked_at_again(watcher, case):
    bench = Bench(watcher)
    lane = bench.lane
    assert lane.tables_at == TABLE
    lane.world.ram.write(TABLE, DESC.pack(TABLE, COPY, INDIRECT, 0) * 8)
    descs, looked_at = FAULTY[case]
    for i, desc in enumerate(descs):
        lane.ring.write_desc(i, *desc)
    lane.ring.set_avail_entry(0, 0)
    lane.ring.avail_idx = 1

    loads = bench.loads(lane.step)

    assert lane.fault
    assert bench.words(loads) == [
        ("shadow used.idx", 2),
        ("guest avail.idx", 2),
        ("guest avail.ring[0]", 2),
        *halves(*range(looked_at)),
    ]
    table = once(range(bench.tables, bench.tables + COPY)) if case == "nested" else {}
    assert bench.copied(loads) == table


def test_a_bad_head_and_a_bad_index(watcher):
    bench = Bench(watcher)
    bench.lane.ring.set_avail_entry(0, SIZE)
    bench.lane.ring.avail_idx = 1
    looked_at = bench.words(bench.loads(bench.lane.step))
    assert "head" in str(bench.lane.fault)
    assert looked_at[1:] == [("guest avail.idx", 2), ("guest avail.ring[0]", 2)]

    bench = Bench(watcher)
    bench.lane.ring.avail_idx = SIZE + 1
    looked_at = bench.words(bench.loads(bench.lane.step))
    assert "avail index" in str(bench.lane.fault)
    assert looked_at == [("shadow used.idx", 2), ("guest avail.idx", 2)]


@pytest.mark.parametrize("bogus", [3, SIZE, 0xFFFFFFFF])
def test_a_bogus_completion(watcher, bogus):
    bench = Bench(watcher)
    bench.lane.shadow.set_used_entry(0, bogus, 1)
    bench.lane.shadow.used_idx = 1
    assert bench.words(bench.loads(bench.lane.step)) == [
        ("shadow used.idx", 2),
        ("shadow used.ring[0].id", 4),
        ("shadow used.ring[0].len", 4),
        ("shadow used.idx", 2),
        ("guest avail.idx", 2),
    ]
    assert bench.lane.counter("violations") == 1


class TestWatching:
    """The test of the test: what must not be is seen."""

    @pytest.fixture
    def memory(self):
        return Memory(PAGE)

    def test_a_second_fetch_is_seen(self, watcher, memory):
        seen = {}
        for name in ("fetch_once", "fetch_twice", "fetch_in_halves"):
            code = watcher.library[name]
            word = ctypes.c_void_p(memory.address + 8)
            accesses = watcher.during(
                lambda code=code, word=word: code(word, ctypes.c_uint16(9)),
                [(memory.address, PAGE)],
            )
            seen[name] = [
                (each.address - memory.address, each.width) for each in accesses
            ]
        assert seen == {
            "fetch_once": [(8, 2)],
            "fetch_twice": [(8, 2), (8, 2)],
            "fetch_in_halves": [(8, 1), (9, 1)],
        }

    def test_every_width_and_direction(self, watcher, memory):
        memory.view[:8] = bytes(range(8))
        for kind, width in (
            (ctypes.c_uint8, 1),
            (ctypes.c_uint16, 2),
            (ctypes.c_uint32, 4),
            (ctypes.c_uint64, 8),
        ):
            word = kind.from_address(memory.address)
            pieces = [(memory.address, PAGE)]
            accesses = watcher.during(lambda word=word: word.value, pieces)
            assert [each[:3] for each in accesses] == [(memory.address, width, False)]
        accesses = watcher.during(
            lambda: ctypes.memset(memory.address, 1, COPY), [(memory.address, PAGE)]
        )
        assert all(each.write for each in accesses)
        assert {byte for each in accesses for byte in each.bytes} == {
            *range(memory.address, memory.address + COPY)
        }

    @pytest.mark.parametrize(
        ("instruction", "width"),
        [
            ("movzwl 0x2(%rdx),%eax", 2),
            ("movzbl (%rdi,%rax,1),%eax", 1),
            ("cmp    %r8w,0x2(%rax)", 2),
            ("testb  $0x1,(%rax)", 1),
            ("cmpw   $0x1,(%rax)", 2),
            ("mov    (%rsi),%r10d", 4),
            ("mov    0x8(%rsi,%rbx,8),%rbp", 8),
            ("movq   (%rsi),%xmm0", 8),
            ("movdqu -0x10(%rsi,%rdx,1),%xmm7", 16),
            ("vmovdqu (%rsi),%ymm1", 32),
            ("vmovdqu64 0x40(%rsi),%zmm17", 64),
        ],
    )
    def test_widths(self, instruction, width):
        assert width_of(instruction) == width
