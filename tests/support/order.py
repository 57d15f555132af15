# SPDX-License-Identifier: Apache-2.0
"""The order of messages that every known back-end takes, checked on what one got."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from tests.support.backs import Seen
from vhost_airlock.vhost.wire import Request

R = Request

SETUP = [
    R.SET_VRING_NUM,
    R.SET_VRING_BASE,
    R.SET_VRING_CALL,
    R.SET_VRING_ERR,
    R.SET_VRING_ADDR,
    R.SET_VRING_KICK,
]
"""The messages that start a ring, all of them and in this order."""
MEMORY = (R.SET_MEM_TABLE, R.ADD_MEM_REG)


def check_order(messages: Iterable[Seen]) -> None:
    """AssertionError when one connection's messages would upset a back-end."""
    seen = list(messages)
    order = [each.request for each in seen]
    assert order[:1] in ([], [R.GET_FEATURES])
    assert order.count(R.SET_OWNER) <= 1
    assert order.count(R.SET_PROTOCOL_FEATURES) <= 1
    assert order.count(R.SET_MEM_TABLE) <= 1, "a table is sent once"
    if R.SET_OWNER in order and R.SET_PROTOCOL_FEATURES in order:
        assert order.index(R.SET_PROTOCOL_FEATURES) < order.index(R.SET_OWNER)
    owned = featured = remembered = False
    steps: dict[int, list[Request]] = defaultdict(list)
    started: set[int] = set()
    stopped: set[int] = set()
    for each in seen:
        request = each.request
        owned |= request == R.SET_OWNER
        if request == R.SET_FEATURES:
            assert not started, "features change while rings run"
            featured = True
        remembered |= request in MEMORY
        if request in SETUP:
            assert owned, f"{each} before an owner"
            assert featured, f"{each} before features"
            assert remembered, f"{each} before memory"
            index = each.payload.index
            assert index not in started, f"{each}: the ring is started"
            if request == R.SET_VRING_CALL and index in stopped and not steps[index]:
                continue  # for the chains which the back-end still has
            steps[index].append(request)
            assert steps[index] == SETUP[: len(steps[index])], steps[index]
            if request == R.SET_VRING_BASE:
                assert each.payload.num == 0, "shadow rings begin at 0"
            if request == R.SET_VRING_KICK:
                started.add(index)
        elif request == R.SET_VRING_ENABLE:
            assert each.payload.index in started, "a ring that is not started"
        elif request == R.GET_VRING_BASE:
            assert each.payload.index in started, "a ring that is not started"
            started.discard(each.payload.index)
            del steps[each.payload.index]
            stopped.add(each.payload.index)
