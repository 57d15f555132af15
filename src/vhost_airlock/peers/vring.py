# SPDX-License-Identifier: Apache-2.0
"""A back-end's record of a vring, and the ring itself once the record is complete."""

from __future__ import annotations

from ..errors import RequestRefused
from ..vhost.fds import Fd, notify
from ..vhost.wire import VringAddr
from .device import DeviceRing
from .memory import Memory
from .ring import SplitLayout, SplitRing


class Vring:
    """A vring. It runs as soon as size, addresses and kick are known, until stop()."""

    def __init__(self) -> None:
        self.num = 0
        self.base = 0
        self.addr: VringAddr | None = None
        self.enabled = False
        self.kick: Fd | None = None
        self.call: Fd | None = None
        self.err: Fd | None = None
        self.ring: DeviceRing | None = None

    def start(self, memory: Memory, event_idx: bool) -> bool:
        """Start, if it isn't running and can run. True: it has started."""
        if self.ring or not self.num or self.addr is None or self.kick is None:
            return False
        try:
            words = self._find(self.addr, memory)
        except LookupError as error:
            raise RequestRefused(f"{self.addr}: {error}") from None
        self.ring = DeviceRing(words, memory.view, base=self.base, event_idx=event_idx)
        return True

    def stop(self) -> None:
        """Stop, and let go of the memory. The ring can go on at `base`."""
        if self.ring:
            self.base = self.ring.next_avail
            self.ring.ring.release()
            self.ring = None

    def let_go(self) -> None:
        """Let the memory be unmapped; find_again() has to follow."""
        if self.ring:
            self.ring.ring.release()

    def find_again(self, memory: Memory) -> None:
        """Use the memory as it is now; LookupError when the ring isn't in it."""
        if self.ring and self.addr:
            self.ring.ring = self._find(self.addr, memory)

    def _find(self, addr: VringAddr, memory: Memory) -> SplitRing:
        layout = SplitLayout(self.num)
        return SplitRing(
            self.num,
            memory.user_view(addr.desc, layout.desc_size),
            memory.user_view(addr.avail, layout.avail_size),
            memory.user_view(addr.used, layout.used_size),
        )

    def set_call(self, fd: Fd | None) -> None:
        """Call with this eventfd from now on, and once at once: a call may just have
        gone to the old one, which is not read any more."""
        self.call = _swap(self.call, fd)
        if self.call:
            notify(self.call)

    def set_err(self, fd: Fd | None) -> None:
        self.err = _swap(self.err, fd)

    def set_kick(self, fd: Fd | None) -> None:
        self.kick = _swap(self.kick, fd)

    def close(self) -> None:
        """Close all descriptors."""
        self.kick = _swap(self.kick, None)
        self.call = _swap(self.call, None)
        self.err = _swap(self.err, None)


def _swap(old: Fd | None, new: Fd | None) -> Fd | None:
    if old:
        old.close()
    return new
