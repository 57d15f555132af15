# SPDX-License-Identifier: Apache-2.0
"""The record of requests in flight: memory that the VMM keeps for the next connection.

GET_INFLIGHT_FD makes it, and the VMM owns it from then on. It gives it to each
connection, with SET_INFLIGHT_FD, and may give one that an earlier airlock or another
back-end has made. Only its place in the file is checked here; its content is judged
when a ring starts (dataplane/recorded.pyx).

The room for a ring is that of other back-ends: 16 bytes, and 16 for each entry, rounded
up to 64.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from ..dataplane.mapping import Mapping
from ..dataplane.recorded import erase
from ..errors import RequestRefused
from ..vhost.fds import Fd
from ..vhost.wire import Inflight
from .isolated import sealed_memfd
from .state import Vring


def room(queue_size: int) -> int:
    """Return the bytes that the record of a ring with this many entries takes."""
    return (16 + 16 * queue_size + 63) & ~63


def make_record(asked: Inflight, rings: Iterable[Vring]) -> tuple[Inflight, Fd]:
    """Make a new record; return where it is, and its file.

    It has room for what is asked for and for all rings that the front has told of:
    Cloud Hypervisor asks by the size of its first ring. A front that gives the record
    back with the numbers that it has asked for, and not with these, loses nothing but
    the records of rings that are larger.
    """
    queues, size = asked.num_queues, asked.queue_size
    for ring in rings:
        queues, size = max(queues, ring.index + 1), max(size, ring.num)
    made = Inflight(queues * room(size), 0, queues, size)
    return made, sealed_memfd("vhost-airlock-inflight", made.mmap_size)


class InflightRecord:
    """The record that the front has given last, if it has given one."""

    def __init__(self) -> None:
        self._mapping: Mapping | None = None
        self._queues = 0
        self._queue_size = 0

    def use(self, told: Inflight, fd: Fd) -> None:
        """Use this one from now on; no ring may be attached."""
        status = os.fstat(fd.fileno())
        needed = told.num_queues * room(told.queue_size)
        end = told.mmap_offset + told.mmap_size
        if not stat.S_ISREG(status.st_mode):
            raise RequestRefused("SET_INFLIGHT_FD: the descriptor is not of a file")
        if told.mmap_size < needed:
            raise RequestRefused(
                f"SET_INFLIGHT_FD: {told.num_queues} queues of {told.queue_size}"
                f" entries take {needed} bytes, more than mmap_size {told.mmap_size}"
            )
        if end > status.st_size:
            raise RequestRefused(
                f"SET_INFLIGHT_FD: the record ends at {end:#x} of a file of"
                f" {status.st_size:#x} bytes"
            )
        if told.mmap_offset % 8:
            raise RequestRefused(
                f"SET_INFLIGHT_FD: mmap_offset {told.mmap_offset} is not aligned to 8"
            )
        try:
            mapping = Mapping(fd.fileno(), needed, told.mmap_offset)
        except OSError as error:
            raise RequestRefused(f"SET_INFLIGHT_FD: {error}") from None
        self.close()
        self._mapping = mapping
        self._queues, self._queue_size = told.num_queues, told.queue_size

    def of_ring(self, index: int) -> tuple[int, int] | None:
        """Return our address of a ring's record, and the entries that it has; there are
        none if the record has fewer rings. None: there is no record at all.
        """
        if self._mapping is None:
            return None
        if index >= self._queues:
            return 0, 0
        return self._mapping.address + index * room(self._queue_size), self._queue_size

    def erase(self) -> None:
        """Nothing is in flight any more; no ring may be attached."""
        if self._mapping is not None:
            for index in range(self._queues):
                erase(self._mapping.address + index * room(self._queue_size))

    def close(self) -> None:
        """Forget the record, which no ring may use any more."""
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None
