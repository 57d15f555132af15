# SPDX-License-Identifier: Apache-2.0
"""Every request is accounted for, and those that are refused say why."""

import pytest

from tests.support.tables import each_row
from vhost_airlock.errors import RequestRefused
from vhost_airlock.proxy.device import Device
from vhost_airlock.proxy.handlers import HANDLED, PASSED, REFUSED, bind
from vhost_airlock.vhost.rules import RULES
from vhost_airlock.vhost.wire import Empty, Request


@each_row(Request)
def test_every_request_is_handled_passed_on_or_refused(request_: Request) -> None:
    tables = (HANDLED, PASSED, REFUSED)
    assert sum(request_ in table for table in tables) == 1
    assert request_ in RULES


def test_no_table_has_a_request_that_there_is_not() -> None:
    known = set(Request)
    assert set(HANDLED) | set(PASSED) | set(REFUSED) == known == set(RULES)


@each_row(sorted(PASSED))
def test_nothing_with_descriptors_or_addresses_is_passed_on(request_: Request) -> None:
    rule = RULES[request_]
    assert rule.fds is not None
    assert max(rule.fds) == 0
    assert max(rule.reply_fds) == 0
    fields = rule.payload.__annotations__
    assert not [name for name in fields if "addr" in name or "iova" in name]


def nothing() -> Device:
    """A device that must not be touched."""
    return Device.__new__(Device)


@each_row(sorted(REFUSED))
def test_a_refusal_names_the_request_and_touches_nothing(request_: Request) -> None:
    handler = bind(nothing())[request_]
    with pytest.raises(RequestRefused, match=rf"^{request_.name}: \S+ \S+"):
        handler(Empty(), [])


def test_every_request_has_a_handler() -> None:
    assert set(bind(nothing())) == set(Request)
