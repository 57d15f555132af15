# SPDX-License-Identifier: Apache-2.0
"""Any words of a guest in indirect tables, and in descriptors of tables."""

from __future__ import annotations

from fuzz.ringmodel import TABLE_ENTRIES, RingModel
from fuzz.source import Source
from fuzz.targets.guest_ring import FLAGS, address, length, options
from vhost_airlock.peers.ring import DESC

FIRSTS = (0, 0, 1, 2, 16, 1022, 1023, 1024)
"""Where tables begin, few places so that they meet."""
COUNTS = (1, 2, 3, 0, 16, 1023, 1024, 1025)


def one(data: bytes) -> None:
    source = Source(data)
    model = RingModel(options(source))
    ring, size = model.lane.ring, model.lane.size
    tables = model.world.ram.view(model.lane.tables_at, DESC.size * TABLE_ENTRIES)
    for _ in range(100):
        if not source.more:
            break
        kind = source.below(6)
        if kind < 2:
            # Entries in a row, each with the next one; the last may lead anywhere.
            first, count = source.choice(FIRSTS), source.choice(COUNTS)
            addr, bytes_, flags = address(source), length(source), source.choice(FLAGS)
            last = source.number(2)
            for at in range(first, min(first + count, TABLE_ENTRIES)):
                following = last if at == first + count - 1 else at - first + 1
                DESC.pack_into(tables, DESC.size * at, addr, bytes_, flags, following)
        elif kind < 4:
            first, count = source.choice(FIRSTS), source.choice(COUNTS)
            head, odd, flags = (
                source.below(size),
                source.below(16),
                source.choice(FLAGS),
            )
            where = model.lane.tables_at + DESC.size * first
            if odd == 15:
                where = address(source)
            bytes_ = DESC.size * count + (odd if odd < 2 else 0)
            ring.write_desc(head, where, bytes_, flags | 4, source.below(size))
            ring.set_avail_entry(ring.avail_idx % size, head)
            ring.avail_idx = (ring.avail_idx + 1) & 0xFFFF
        elif kind == 4:
            # A descriptor of the ring itself, with a table behind it.
            head = source.below(size)
            addr, bytes_, flags = address(source), length(source), source.choice(FLAGS)
            ring.write_desc(head, addr, bytes_, flags, source.below(size))
            ring.set_avail_entry(ring.avail_idx % size, head)
            ring.avail_idx = (ring.avail_idx + 1) & 0xFFFF
        else:
            model.step()
            if model.flight:
                slot = sorted(model.flight)[source.below(len(model.flight))]
                model.complete(slot, source.number(2), source.take(4))
    model.end()
