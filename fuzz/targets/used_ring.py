# SPDX-License-Identifier: Apache-2.0
"""Any words of a back in isolated memory: used ring, descriptors, buffers."""

from __future__ import annotations

from fuzz.ringmodel import PATTERN, RingModel
from fuzz.source import Source
from fuzz.targets.guest_ring import options
from tests.support.plane import PAGE

LENGTHS = (16, 1, 64, 511, 512, 513, 2000, PAGE)
SAID = (0, 1, 16, 512, 513, PAGE, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF)


def one(data: bytes) -> None:
    source = Source(data)
    model = RingModel(options(source))
    for _ in range(200):
        if not source.more:
            break
        source.choice(ACTS)(model, source)
    model.end()


def guest_offers(model: RingModel, source: Source) -> None:
    """A good chain, of a few buffers one behind the other."""
    ring, size = model.lane.ring, model.lane.size
    waiting = (ring.avail_idx - model.seen) & 0xFFFF
    free = sorted(set(range(min(size, 64))) - model.busy)
    if waiting or not free or model.broken:
        return
    count = min(1 + source.below(4), len(free))
    readable = source.below(5)
    at = source.below(PAGE)
    for i, index in enumerate(free[:count]):
        last = i == count - 1
        flags = (2 if i >= readable else 0) | (0 if last else 1)
        length = source.choice(LENGTHS)
        ring.write_desc(index, at, length, flags, 0 if last else free[i + 1])
        at += length
    ring.set_avail_entry(ring.avail_idx % size, free[0])
    ring.avail_idx = (ring.avail_idx + 1) & 0xFFFF
    model.step()


def step(model: RingModel, source: Source) -> None:
    model.step()


def completes(model: RingModel, source: Source) -> None:
    """An element with any id, or an id that was in flight, and the index moves on."""
    shadow = model.lane.shadow
    ids = sorted([*model.flight, *model.parked, *model.quarantine])
    kind = source.number(1)
    id = source.number(4) if kind == 0xFF or not ids else ids[kind % len(ids)]
    shadow.set_used_entry(shadow.used_idx % model.lane.size, id, source.choice(SAID))
    shadow.used_idx = (shadow.used_idx + 1) & 0xFFFF


def jumps(model: RingModel, source: Source) -> None:
    shadow = model.lane.shadow
    shadow.used_idx = (shadow.used_idx + source.number(2)) & 0xFFFF
    shadow.used_flags = source.number(1)
    shadow.avail_event = source.number(2)


def writes(model: RingModel, source: Source) -> None:
    """Over all that the back has: its rings, small buffers too, or the pool."""
    rings = model.world.isolated.pieces[model.lane.piece_at].view
    memory = model.pool_memory.view if source.flag() else rings
    at = source.number(3) % len(memory)
    run = PATTERN[: source.number(2)] if source.flag() else source.take(8)
    run = run[: len(memory) - at]
    memory[at : at + len(run)] = run


def stops(model: RingModel, source: Source) -> None:
    """The ring stops and starts; the back tells a right or a wrong base.

    In between it writes, and completes chains that it has still, in the ring that it
    has then.
    """
    base = model.stop(None if source.flag() else source.number(2))
    for _ in range(source.below(4)):
        source.choice((completes, completes, writes))(model, source)
    if source.flag():
        model.look_back()
    ring = model.lane.ring
    match source.below(4):
        case 1:  # without what it had offered
            ring.avail_idx = base
        case 2:  # anew
            base = ring.avail_idx = ring.used_idx = source.number(2)
        case 3:  # the guest's ring as it was, but from another chain on
            base = (base + source.below(3)) & 0xFFFF
    model.start(base)


ACTS = (guest_offers, step, completes, completes, writes, jumps, stops)
