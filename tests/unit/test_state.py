# SPDX-License-Identifier: Apache-2.0
"""The life of a ring: what the table promises, and what the front may tell."""

import itertools
from collections.abc import Iterable, Iterator

import pytest

from vhost_airlock.errors import ProtocolError, RequestRefused
from vhost_airlock.proxy.state import TABLE, Action, Change, Event, State, Vring
from vhost_airlock.vhost.wire import VringAddr

ATTACHED = set(State) - {State.STOPPED}


def after(state: State, events: Iterable[Event]) -> Iterator[Change]:
    """The changes that these events bring, one after the other."""
    for event in events:
        change = TABLE.get((state, event), Change(state))
        yield change
        state = change.state


def test_every_state_is_reached() -> None:
    reached, new = set(), {State.STOPPED}
    while new:
        reached |= new
        new = {TABLE[key].state for key in TABLE if key[0] in reached} - reached
    assert reached == set(State)


def test_a_stop_ends_every_state_in_use() -> None:
    """However it is on both rings, it leaves both, and asks the back for its base."""
    for state in ATTACHED - {State.STARTING, State.DRAINING}:
        changes = list(after(state, [Event.STOP, Event.DRAINED]))
        assert changes[-1].state is State.STOPPED, state
        assert Action.DETACH in [change.action for change in changes], state


def test_chains_in_flight_are_waited_for_unless_the_shadow_ring_is_dead() -> None:
    """C3: also those of a ring that the guest broke."""
    drained = {
        state
        for state in ATTACHED
        if Action.DRAIN in [c.action for c in after(state, [Event.STOP])]
    }
    assert drained == {State.HELD, State.RUNNING, State.BROKEN}


def test_a_back_that_is_gone_ends_every_state_in_use() -> None:
    changes = {state: TABLE[state, Event.LOST] for state in ATTACHED}
    assert set(changes.values()) == {Change(State.STOPPED, Action.ABANDON)}


def test_chains_are_taken_in_one_state_only() -> None:
    """The actions on the way there and away are those that begin and end the taking."""
    for (state, event), change in TABLE.items():
        enters = state is not State.RUNNING and change.state is State.RUNNING
        assert enters == (change.action is Action.TAKE), (state, event)
        leaves = state is State.RUNNING and change.state is not State.RUNNING
        if leaves and event not in (Event.GUEST_FAULT, Event.FAULT):
            assert change.action in (Action.HOLD, Action.DRAIN, Action.ABANDON)


def test_new_values_are_refused_by_an_enabled_ring_alone() -> None:
    refusing = {
        state
        for (state, event), change in TABLE.items()
        if event is Event.RETELL and change.action is Action.REFUSE
    }
    assert refusing == {State.RUNNING}
    for state in (State.HELD, State.BROKEN, State.DEAD):
        changes = list(after(state, [Event.RETELL, Event.DRAINED]))
        assert changes[-1].state is State.STOPPED, state


def test_no_sequence_of_events_leaves_a_ring_attached_twice_or_not_at_all() -> None:
    """ATTACH and the actions that let go of both rings take turns, whatever happens."""
    ends = {Action.DETACH, Action.ABANDON}
    walks = {(State.STOPPED, False)}
    for _ in range(8):
        following = set()
        for (state, attached), event in itertools.product(walks, Event):
            change = TABLE.get((state, event), Change(state))
            if change.action is Action.ATTACH:
                assert not attached, (state, event)
                attached = True
            elif change.action in ends:
                assert attached, (state, event)
                attached = False
            assert attached == (change.state is not State.STOPPED), (state, event)
            following.add((change.state, attached))
        walks = following


def test_ring_size() -> None:
    vring = Vring(0)
    for num in (1, 2, 256, 32768):
        vring.set_num(num)
        assert vring.num == num
    for num in (0, 3, 255, 32767, 65536, 1 << 31, (1 << 32) - 1):
        with pytest.raises(
            RequestRefused, match=f"SET_VRING_NUM: ring 7: {num} entries"
        ):
            Vring(7).set_num(num)


def test_base_has_16_bits() -> None:
    vring = Vring(7)
    vring.set_base(0xFFFF)
    assert vring.base == 0xFFFF
    with pytest.raises(RequestRefused, match="SET_VRING_BASE: ring 7: base 0x10000"):
        vring.set_base(0x10000)
    assert vring.base == 0xFFFF


ALIGNED = VringAddr(7, 0, desc=0x1000, used=0x3004, avail=0x2002)


def test_parts_of_a_ring() -> None:
    vring = Vring(7, num=4)
    vring.set_addr(ALIGNED)
    assert vring.parts() == [(0x1000, 64, 16), (0x2002, 14, 2), (0x3004, 38, 4)]


@pytest.mark.parametrize(
    ("addr", "text"),
    [
        (VringAddr(7, 0, desc=0x1008, used=0x3004, avail=0x2002), "desc 0x1008.*16"),
        (VringAddr(7, 0, desc=0x1000, used=0x3002, avail=0x2002), "used 0x3002.*4"),
        (VringAddr(7, 0, desc=0x1000, used=0x3004, avail=0x2001), "avail 0x2001.*2"),
    ],
)
def test_misaligned_part_is_named(addr: VringAddr, text: str) -> None:
    vring = Vring(7, num=4)
    vring.set_addr(ALIGNED)
    with pytest.raises(RequestRefused, match=f"SET_VRING_ADDR: ring 7: {text}"):
        vring.set_addr(addr)
    assert vring.addr == ALIGNED


def test_a_ring_is_told_when_it_has_size_address_and_a_start() -> None:
    assert Vring(7, num=8, addr=ALIGNED, started=True).told
    assert not Vring(7, addr=ALIGNED, started=True).told
    assert not Vring(7, num=8, started=True).told
    assert not Vring(7, num=8, addr=ALIGNED).told
    with pytest.raises(ProtocolError, match="ring 7 has no address"):
        Vring(7, num=8).parts()
