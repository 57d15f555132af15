# SPDX-License-Identifier: Apache-2.0
"""The life of a ring, over both planes, in one table.

Two things decide it. *The front's word* is in `Vring`: size, base, addresses, whether
it has started the ring and enabled it. *The ring's state* is one of `State`, and
changes only by `TABLE`: for a state and an event, the next state and the action that
leads to it. An event that is not in a state's row changes nothing.

Rules that the table rests on:

1. Starting is a function of state. After each message each ring is looked at: if the
   front has told all that a start takes, and its memory is mapped, READY happens. So
   messages may come in any order.
2. A start attaches both rings, lets the back have the shadow ring, and only then, with
   its share of the pool set, takes chains.
3. A stop takes no new chains, waits for those that the back has fetched, asks the back
   for its base, and lets go of both rings. All rings of one message share one deadline.
4. Chains that the back did not finish stay with the pump (pump.pyx): they are a number
   beside the state, and outlive every state until the back completes them or is gone.
5. New values are told to a ring that takes no chains: an enabled one refuses them, a
   held or broken one stops first.
"""

from __future__ import annotations

from enum import Enum, auto

from ..dataplane.pump import check_base, layout
from ..errors import ProtocolError, RequestRefused
from ..record import changeable, record
from ..vhost.wire import VringAddr


class State(Enum):
    """The states of a ring; each says what the ring's pump does."""

    STOPPED = auto()
    """Nothing: it is on neither ring."""
    STARTING = auto()
    """Nothing yet: it is on both rings, and the back is being told."""
    HELD = auto()
    """It completes chains and takes none: the ring is not enabled."""
    RUNNING = auto()
    """It takes chains and completes them."""
    DRAINING = auto()
    """It completes chains and takes none: a stop waits for those at the back."""
    BROKEN = auto()
    """It completes chains and takes none: the guest broke its ring."""
    DEAD = auto()
    """Nothing: the back broke the shadow ring, or memory of either ring is gone."""


class Turn(Enum):
    """The part of a ring in the search for a request over which backs are lost."""

    FREE = auto()
    """There is no search: it takes chains as it likes."""
    ALONE = auto()
    """Its back gets one of its chains at a time."""
    WAITS = auto()
    """It takes no chains."""


class Event(Enum):
    """An event in the life of a ring."""

    READY = auto()
    """The front has told all that a start takes, and its memory is there."""
    STARTED = auto()
    """The back has the ring."""
    ENABLE = auto()
    DISABLE = auto()
    RETELL = auto()
    """The front is about to tell another size, base, or set of features."""
    STOP = auto()
    """The front asks for the base, resets the device or leaves, or we are to end."""
    GUEST_FAULT = auto()
    """The guest broke its ring."""
    FAULT = auto()
    """The back broke the shadow ring, or memory of either ring is gone."""
    DRAINED = auto()
    """All is done that the back has fetched, or the time for that is over."""
    LOST = auto()
    """The back is gone, or the session ends without it."""


class Action(Enum):
    """The deed of a ring on its way to the next state."""

    NONE = auto()
    ATTACH = auto()
    """Attach the pump to both rings, and let the back have the shadow ring."""
    TAKE = auto()
    """Enable the back's ring, and take chains."""
    HOLD = auto()
    """Take no more chains, and disable the back's ring."""
    DRAIN = auto()
    """Take no more chains, and wait for those that the back has fetched."""
    DETACH = auto()
    """Ask the back for its base, and let go of both rings."""
    ABANDON = auto()
    """Let go of both rings without the back."""
    REFUSE = auto()
    """Refuse the message."""


@record
class Change:
    """The next state, and the action that leads to it."""

    state: State
    action: Action = Action.NONE


_S, _E, _A = State, Event, Action

TABLE: dict[tuple[State, Event], Change] = {
    (_S.STOPPED, _E.READY): Change(_S.STARTING, _A.ATTACH),
    (_S.STARTING, _E.STARTED): Change(_S.HELD),
    (_S.STARTING, _E.LOST): Change(_S.STOPPED, _A.ABANDON),
    (_S.HELD, _E.ENABLE): Change(_S.RUNNING, _A.TAKE),
    (_S.HELD, _E.RETELL): Change(_S.DRAINING, _A.DRAIN),
    (_S.HELD, _E.STOP): Change(_S.DRAINING, _A.DRAIN),
    (_S.HELD, _E.GUEST_FAULT): Change(_S.BROKEN),
    (_S.HELD, _E.FAULT): Change(_S.DEAD),
    (_S.HELD, _E.LOST): Change(_S.STOPPED, _A.ABANDON),
    (_S.RUNNING, _E.DISABLE): Change(_S.HELD, _A.HOLD),
    (_S.RUNNING, _E.RETELL): Change(_S.RUNNING, _A.REFUSE),
    (_S.RUNNING, _E.STOP): Change(_S.DRAINING, _A.DRAIN),
    (_S.RUNNING, _E.GUEST_FAULT): Change(_S.BROKEN),
    (_S.RUNNING, _E.FAULT): Change(_S.DEAD),
    (_S.RUNNING, _E.LOST): Change(_S.STOPPED, _A.ABANDON),
    (_S.DRAINING, _E.DRAINED): Change(_S.STOPPED, _A.DETACH),
    (_S.DRAINING, _E.LOST): Change(_S.STOPPED, _A.ABANDON),
    (_S.BROKEN, _E.RETELL): Change(_S.DRAINING, _A.DRAIN),
    (_S.BROKEN, _E.STOP): Change(_S.DRAINING, _A.DRAIN),
    (_S.BROKEN, _E.FAULT): Change(_S.DEAD),
    (_S.BROKEN, _E.LOST): Change(_S.STOPPED, _A.ABANDON),
    (_S.DEAD, _E.RETELL): Change(_S.STOPPED, _A.DETACH),
    (_S.DEAD, _E.STOP): Change(_S.STOPPED, _A.DETACH),
    (_S.DEAD, _E.LOST): Change(_S.STOPPED, _A.ABANDON),
}


@changeable
class Vring:
    """A ring as the front describes it."""

    index: int
    num: int = 0
    """Entries; 0: not told yet."""
    base: int | None = None
    """Where it starts, or has stopped; None: neither was said in this connection."""
    addr: VringAddr | None = None
    started: bool = False
    """The front has started it, and has not stopped it since."""
    enabled: bool = False
    """The front has enabled it, and has not disabled it since."""

    @property
    def told(self) -> bool:
        """Has the front told all that a start takes?"""
        return self.started and self.num > 0 and self.addr is not None

    def set_num(self, num: int) -> None:
        """Set the number of entries. RequestRefused if no ring can have that number."""
        try:
            layout(num)
        except ValueError as error:
            raise RequestRefused(f"SET_VRING_NUM: ring {self.index}: {error}") from None
        self.num = num

    def set_base(self, base: int) -> None:
        """Set the position at which to start. RequestRefused if it is none."""
        try:
            check_base(base)
        except ValueError as error:
            raise RequestRefused(
                f"SET_VRING_BASE: ring {self.index}: base {error}"
            ) from None
        self.base = base

    def set_addr(self, addr: VringAddr) -> None:
        """Set where the ring's parts are. RequestRefused if one is misaligned."""
        alignments = (align for _, align in layout(1))
        for (name, value), align in zip(_parts(addr), alignments, strict=True):
            if value % align:
                raise RequestRefused(
                    f"SET_VRING_ADDR: ring {self.index}: {name} {value:#x}"
                    f" is not aligned to {align}"
                )
        self.addr = addr

    def parts(self) -> list[tuple[int, int, int]]:
        """Return (user address, bytes, alignment) of each of the ring's three parts."""
        if self.addr is None:
            raise ProtocolError(f"ring {self.index} has no address")
        return [
            (address, size, align)
            for (_, address), (size, align) in zip(
                _parts(self.addr), layout(self.num), strict=True
            )
        ]


def _parts(addr: VringAddr) -> tuple[tuple[str, int], ...]:
    return ("desc", addr.desc), ("avail", addr.avail), ("used", addr.used)
