# SPDX-License-Identifier: Apache-2.0
"""A model of one ring index and its notifications, and all states that it can be in.

A *producer* moves an index and notifies; a *consumer* follows it, asks for
notifications, and sleeps. A ring is two of these: the driver produces the avail index,
the device the used index. Each atomic step of the real code is a step here: a load, a
store, a fence, a signal, a sleep. Between any two of them the other side can do any
number of its own.

Stores go through a buffer, as on x86: the other side sees them in their order, but any
time later, unless a fence waits for it. That is the reordering that matters here. What
a weaker processor or the compiler could do beside it is for the code's acquire and
release to prevent, and not shown by this.

Indices are counted modulo twice the ring's size, so that they wrap round all the time
and every state has successors; there is no bound on the number of chains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple


class P(IntEnum):
    """The producer's next step."""

    IDLE = 0
    FENCE = 1
    LOOK = 2
    SIGNAL = 3
    # Only with the mistake "look first": the index is stored last.
    LATE_STORE = 4


class C(IntEnum):
    """The consumer's next step."""

    LOOK = 0
    TAKE = 1
    DISARM = 2
    ARM = 3
    FENCE = 4
    LOOK_AGAIN = 5
    SLEEP = 6


class State(NamedTuple):
    # Shared memory: the index as shown, the event index, the flag "do not notify".
    shown: int
    event: int
    quiet: bool
    # The eventfd.
    signal: bool
    # Stores on their way to memory: indices; event indices or flags.
    producer_stores: tuple[int, ...]
    consumer_stores: tuple[int, ...]
    # The producer's own: what is next, where its index was before, first time?
    producer: P
    old: int
    new: int
    first: bool
    # The consumer's own: what is next, up to where it took, up to where it may.
    consumer: C
    seen: int
    known: int
    armed: bool
    moved: bool
    stalled: bool


class Broken(Exception):
    """A state that must not be, and the way there."""


@dataclass(frozen=True)
class Model:
    """The code's variants, and mistakes in it."""

    size: int
    event_idx: bool
    calls_first: bool = False
    """The producer signals with its first publish whatever the event index is."""
    disarms_awake: bool = False
    """The consumer asks for quiet when it is awake, not when it took something."""
    stalls: bool = False
    """The consumer can be out of room; then it sleeps till there is some."""
    mistakes: frozenset[str] = frozenset()
    whole_words: bool = False
    """Indices have 16 bits, as real ones."""

    @property
    def modulus(self) -> int:
        return 1 << 16 if self.whole_words else 2 * self.size

    @property
    def stores_late(self) -> bool:
        return "look before store" in self.mistakes

    def starts(self) -> Iterator[State]:
        """Any rest of an earlier use may stand in memory."""
        for event in range(self.modulus if self.event_idx else 1):
            for quiet in (False,) if self.event_idx else (False, True):
                for waiting in range(self.size + 1):
                    yield State(
                        shown=waiting,
                        event=event,
                        quiet=quiet,
                        signal=False,
                        producer_stores=(),
                        consumer_stores=(),
                        producer=P.IDLE,
                        old=waiting,
                        new=waiting,
                        first=True,
                        consumer=C.LOOK,
                        seen=0,
                        known=0,
                        armed=False,
                        moved=False,
                        stalled=False,
                    )

    def need_event(self, event: int, new: int, old: int) -> bool:
        if "need_event too early" in self.mistakes:
            return (new - event) % self.modulus < (new - old) % self.modulus
        return (new - event - 1) % self.modulus < (new - old) % self.modulus

    def successors(self, state: State) -> Iterator[State]:
        yield from self.memory_steps(state)
        yield from self.producer_steps(state)
        yield from self.consumer_steps(state)

    def memory_steps(self, state: State) -> Iterator[State]:
        """The oldest store of either side reaches memory."""
        if state.producer_stores:
            index, *rest = state.producer_stores
            yield state._replace(shown=index, producer_stores=tuple(rest))
        if state.consumer_stores:
            value, *rest = state.consumer_stores
            state = state._replace(consumer_stores=tuple(rest))
            if self.event_idx:
                yield state._replace(event=value)
            else:
                yield state._replace(quiet=bool(value))

    def producer_steps(self, state: State) -> Iterator[State]:
        """publish() of guest_split.pyx and shadow_split.pyx, and then the signal."""
        match state.producer:
            case P.IDLE:
                room = self.size - (state.new - state.seen) % self.modulus
                for count in range(1, room + 1):
                    new = (state.new + count) % self.modulus
                    after = state._replace(old=state.new, new=new)
                    if self.stores_late:
                        yield after._replace(producer=P.LOOK)
                    elif len(state.producer_stores) < 2:
                        yield after._replace(
                            producer=P.FENCE,
                            producer_stores=(*state.producer_stores, new),
                        )
            case P.FENCE:
                if not state.producer_stores or "no producer fence" in self.mistakes:
                    yield state._replace(producer=P.LOOK)
            case P.LOOK:
                if not self.event_idx:
                    wanted = not state.quiet
                elif self.calls_first and state.first:
                    wanted = True
                else:
                    wanted = self.need_event(state.event, state.new, state.old)
                end = P.LATE_STORE if self.stores_late else P.IDLE
                # `old` is not needed any more: one value for all makes fewer states.
                yield state._replace(
                    producer=P.SIGNAL if wanted else end,
                    old=state.new,
                    first=False,
                )
            case P.LATE_STORE:
                yield state._replace(producer=P.IDLE, shown=state.new)
            case P.SIGNAL:
                end = P.LATE_STORE if self.stores_late else P.IDLE
                yield state._replace(producer=end, signal=True)

    def consumer_steps(self, state: State) -> Iterator[State]:
        """A worker's round: step(), rest(), fence, pending(), sleep."""
        match state.consumer:
            case C.LOOK:
                if (state.shown - state.seen) % self.modulus > self.size:
                    raise Broken("an index that is right is taken for a fault")
                after = state._replace(known=state.shown)
                if after.known == after.seen:
                    yield after._replace(consumer=C.DISARM)
                else:
                    yield after._replace(consumer=C.TAKE)
            case C.TAKE:
                # Any number: the budget may be at its end. All: look for more.
                waiting = (state.known - state.seen) % self.modulus
                for count in range(1, waiting + 1):
                    seen = (state.seen + count) % self.modulus
                    after = state._replace(seen=seen, moved=True, consumer=C.DISARM)
                    yield after
                    if count == waiting:
                        yield after._replace(consumer=C.LOOK)
                    if self.stalls:
                        # The last one has no room. It is ours, and waits.
                        yield after._replace(moved=count > 1, stalled=True)
            case C.DISARM:
                after = state
                if state.armed and (state.moved or state.stalled):
                    after = self.disarm(state)
                if state.moved:
                    again = C.TAKE if state.known != state.seen else C.LOOK
                    yield after._replace(moved=False, consumer=again, stalled=False)
                    # In the next round, the one that waited may still find no room.
                    if state.stalled:
                        yield after._replace(moved=False, consumer=C.ARM)
                else:
                    yield after._replace(consumer=C.ARM)
            case C.ARM:
                if not state.stalled and not state.armed:
                    value = state.seen if self.event_idx else 0
                    if "armed one late" in self.mistakes:
                        value = (value + 1) % self.modulus
                    stores = (*state.consumer_stores, value)
                    if "not armed" in self.mistakes:
                        stores = state.consumer_stores
                    state = state._replace(armed=True, consumer_stores=stores)
                yield state._replace(consumer=C.FENCE)
            case C.FENCE:
                if not state.consumer_stores or "no consumer fence" in self.mistakes:
                    yield state._replace(consumer=C.LOOK_AGAIN)
            case C.LOOK_AGAIN:
                more = state.seen != state.known or state.shown != state.seen
                if "no second look" in self.mistakes:
                    more = False
                if more and not state.stalled:
                    yield self.awake(state)
                else:
                    yield state._replace(consumer=C.SLEEP)
            case C.SLEEP:
                # Another ring may wake the worker too, and so may room in the pool.
                yield self.awake(state._replace(signal=False))
                if not state.signal:
                    yield self.awake(state)

    def awake(self, state: State) -> State:
        if self.disarms_awake and state.armed and len(state.consumer_stores) < 2:
            state = self.disarm(state)
        if state.stalled:
            # The chain that waited moves, or waits on: both are a state of DISARM.
            return state._replace(consumer=C.DISARM, moved=True)
        again = C.TAKE if state.known != state.seen else C.LOOK
        return state._replace(consumer=again)

    def disarm(self, state: State) -> State:
        if "still armed" in self.mistakes:
            return state
        if self.event_idx:  # the event index just stays behind
            return state._replace(armed=False)
        stores = (*state.consumer_stores, 1)
        return state._replace(armed=False, consumer_stores=stores)

    def check(self, state: State) -> None:
        """The conditions that must hold in every state."""
        if (state.new - state.seen) % self.modulus > self.size:
            raise Broken("more is outstanding than the ring holds")
        if (
            state.consumer is C.SLEEP
            and not state.stalled
            and not state.signal
            and state.producer is P.IDLE
            and not state.producer_stores
            and not state.consumer_stores
            and state.shown != state.seen
        ):
            raise Broken("a wake-up is lost: both rest, and there is something to take")

    def normal(self, state: State) -> State:
        """The same, counted from where the consumer is.

        All that is done with indices is subtraction modulo the same number, so what
        can come of a state does not change by this.
        """
        shift, modulus = state.seen, self.modulus
        if not shift:
            return state
        event_values = tuple((v - shift) % modulus for v in state.consumer_stores)
        return state._replace(
            shown=(state.shown - shift) % modulus,
            event=(state.event - shift) % modulus if self.event_idx else 0,
            producer_stores=tuple((v - shift) % modulus for v in state.producer_stores),
            consumer_stores=event_values if self.event_idx else state.consumer_stores,
            old=(state.old - shift) % modulus,
            new=(state.new - shift) % modulus,
            seen=0,
            known=(state.known - shift) % modulus,
        )

    def with_mistake(self, mistake: str) -> Model:
        return replace(self, mistakes=frozenset([mistake]))


def explore(model: Model, *, shifted: bool = True) -> set[State]:
    """All states that can be; Broken with the shortest way to one that must not.

    `shifted`: states that differ by where in the ring they are count as one.
    """

    def same(state: State) -> State:
        return model.normal(state) if shifted else state

    before: dict[State, State | None] = {same(start): None for start in model.starts()}
    layer = list(before)
    while layer:
        following = []
        for state in layer:
            try:
                model.check(state)
                for successor in model.successors(state):
                    successor = same(successor)
                    if successor not in before:
                        before[successor] = state
                        following.append(successor)
            except Broken as broken:
                way = [state]
                while last := before[way[-1]]:
                    way.append(last)
                steps = "\n".join(map(str, reversed(way)))
                raise Broken(f"{broken}; {len(way)} states:\n{steps}") from None
        layer = following
    return set(before)
