# SPDX-License-Identifier: Apache-2.0
"""Any words of a guest in its ring, descriptor table and avail ring."""

from __future__ import annotations

from fuzz.ringmodel import RING_AT, Options, RingModel
from fuzz.source import Source
from tests.support.plane import PAGE

SIZES = (4, 1, 2, 16, 64, 2048)
BASES = (0, 1, 0x7FFE, 0xFFF0, 0xFFFF)
ADDRESSES = (0, PAGE, 2 * PAGE, 4 * PAGE, 1 << 32, RING_AT, (1 << 64) - PAGE)
LENGTHS = (16, 0, 1, 63, 64, 511, 512, 513, PAGE, PAGE + 1, 3 * PAGE, 0xFFFFFFFF)
FLAGS = (0, 1, 2, 3, 4, 5, 6, 0xFFFF)


def options(source: Source) -> Options:
    bits = source.number(1)
    return Options(
        size=source.choice(SIZES),
        base=source.choice(BASES),
        guest_event_idx=bool(bits & 1),
        guest_indirect=not bits & 2,
        back_event_idx=bool(bits & 4),
        back_indirect=not bits & 8,
        policy=("full", "used", "used+tail", "full")[bits >> 4 & 3],
        whole_batches=bool(bits & 64),
        logs=bool(bits & 128),
    )


def address(source: Source) -> int:
    """Near something, or anywhere."""
    if source.number(1) == 0xFF:
        return source.number(8)
    return (source.choice(ADDRESSES) + source.number(2) - 256) % (1 << 64)


def length(source: Source) -> int:
    kind = source.number(1)
    return source.number(4) if kind == 0xFF else LENGTHS[kind % len(LENGTHS)]


def guest_acts(model: RingModel, source: Source) -> None:
    ring, size = model.lane.ring, model.lane.size
    kind = source.below(9)
    if kind < 2:
        at = source.below(size)
        addr, bytes_, flags = address(source), length(source), source.choice(FLAGS)
        ring.write_desc(at, addr, bytes_, flags, source.number(2) % (size + 1))
    elif kind == 2:
        at, end = source.below(size), source.below(size)
        addr, bytes_, flags = address(source), length(source), source.choice(FLAGS)
        for index in range(at, end):
            ring.write_desc(index, addr, bytes_, flags, index + 1)
    elif kind < 5:
        ring.set_avail_entry(ring.avail_idx % size, source.number(2) % (size + 1))
        ring.avail_idx = (ring.avail_idx + 1) & 0xFFFF
    elif kind == 5:
        ring.avail_idx = (ring.avail_idx + source.number(2)) & 0xFFFF
    elif kind == 6:
        model.step()
    elif kind == 7:
        model.start(model.stop(None if source.flag() else source.number(2)))
    elif model.flight:
        slot = sorted(model.flight)[source.below(len(model.flight))]
        model.complete(slot, source.number(2), source.take(4))


def one(data: bytes) -> None:
    source = Source(data)
    model = RingModel(options(source))
    for _ in range(200):
        if not source.more:
            break
        guest_acts(model, source)
    model.end()
