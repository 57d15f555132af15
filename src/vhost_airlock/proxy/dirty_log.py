# SPDX-License-Identifier: Apache-2.0
"""The dirty log: memory of the VMM, with a bit for each page that we have written.

The VMM gives it with SET_LOG_BASE, and may give another one at any time: QEMU when the
guest gets more memory, Cloud Hypervisor for each look at it. Only its place in the file
is checked here; the data plane sets the bits (dataplane/dirty_log.pxd).

Two bits say which stores are logged. VHOST_F_LOG_ALL among the features: every store
into the guest's memory. VHOST_VRING_F_LOG among the flags of a ring's addresses: every
store to that ring. Without a log, nothing is logged.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from ..dataplane.mapping import Mapping
from ..dataplane.pump import Pump
from ..dataplane.regions import GuestMemory
from ..errors import RequestRefused
from ..log import Logger
from ..vhost.fds import Fd
from ..vhost.wire import Feature, Log, VringAddr, VringFlag
from .ration import Ration


def map_log(told: Log, fd: Fd) -> Mapping:
    """Map the log that a front gives. RequestRefused if it is not all there."""
    status = os.fstat(fd.fileno())
    end = told.offset + told.size
    if not stat.S_ISREG(status.st_mode):
        raise RequestRefused("SET_LOG_BASE: the descriptor is not of a file")
    if told.size == 0:
        raise RequestRefused("SET_LOG_BASE: mmap_size is 0")
    if end > status.st_size:
        raise RequestRefused(
            f"SET_LOG_BASE: the log ends at {end:#x} of a file of"
            f" {status.st_size:#x} bytes"
        )
    try:
        return Mapping(fd.fileno(), told.size, told.offset)
    except OSError as error:
        raise RequestRefused(f"SET_LOG_BASE: {error}") from None


class DirtyLog:
    """The log that the front has given last, if it has given one."""

    def __init__(self, guest: GuestMemory, log: Logger) -> None:
        self._guest = guest
        self._log = log
        self._mapping: Mapping | None = None
        self._fd: Fd | None = None
        self._left = False
        """Rings have started since it came: the front may have left it before."""
        self._unlogged = 0
        """Pages beyond it of which the airlock's log was told."""
        self._ration = Ration()

    def of_ring(self, features: int | None, addr: VringAddr | None) -> dict[str, bool]:
        """Return which stores of a ring are logged, as Pump.set_logging() takes it."""
        everything = bool((features or 0) & Feature.LOG_ALL)
        its_words = addr is not None and bool(addr.flags & VringFlag.LOG)
        is_there = self._mapping is not None
        return {
            "words": is_there and (everything or its_words),
            "buffers": is_there and everything,
        }

    @property
    def fileno(self) -> int:
        """The eventfd by which the front is told of bits that were set; -1: none."""
        return -1 if self._fd is None else self._fd.fileno()

    @property
    def place(self) -> tuple[int, int]:
        """Our address of the log, and its bytes; (0, 0): there is none."""
        mapping = self._mapping
        return (0, 0) if mapping is None else (mapping.address, mapping.size)

    def ring_starts(self) -> None:
        """A ring is about to start, and to write what has become of its chains."""
        self._left = self._mapping is not None

    def swap(self, new: Mapping) -> Mapping | None:
        """Log into `new` from now on, while no worker runs. Returns the last log, for
        retire().
        """
        old, self._mapping = self._mapping, new
        self._guest.set_log(new.address, new.size)
        return old

    def retire(self, old: Mapping) -> None:
        """Close the log of before, which no worker uses any more.

        A front that starts rings while it migrates may have read it for the last time
        before, and give the next one only now: then that one gets its bits.
        """
        if self._left and not self._guest.carry_over(old.address, old.size):
            self._log.error(
                "the VMM's dirty log was cut short: pages that were written when rings"
                " started may not be marked"
            )
        self._left = False
        old.close()

    def swap_fd(self, new: Fd) -> Fd | None:
        """Tell the front there; the same for the eventfd."""
        old, self._fd = self._fd, new
        return old

    def look(self, pumps: Iterable[Pump]) -> None:
        """Say if pages were written for which it has no bits, in these pumps' rings."""
        unlogged = sum(pump.unlogged for pump in pumps)
        if unlogged > self._unlogged:
            self._ration.log(
                self._log,
                "the VMM's dirty log has no bits for pages that were written: a"
                " migration can't be right (so far %d times)",
                unlogged,
            )
            self._unlogged = unlogged

    def close(self) -> None:
        """Forget the log, which no pump may use any more."""
        self._guest.set_log(0, 0)
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None
        if self._fd is not None:
            self._fd.close()
            self._fd = None
