# SPDX-License-Identifier: Apache-2.0
"""Every request is accounted for, and those that are refused say why."""

import inspect

import pytest

from vhost_airlock.errors import RequestRefused
from vhost_airlock.proxy.device import Device
from vhost_airlock.proxy.handlers import HANDLED, PASSED, REFUSED, bind
from vhost_airlock.vhost.rules import RULES, Ack
from vhost_airlock.vhost.wire import Empty, Request


@pytest.mark.parametrize("request_", Request)
def test_every_request_is_handled_passed_on_or_refused(request_: Request) -> None:
    tables = (HANDLED, PASSED, REFUSED)
    assert sum(request_ in table for table in tables) == 1
    assert request_ in RULES


def test_no_table_has_a_request_that_there_is_not() -> None:
    known = set(Request)
    assert set(HANDLED) | set(PASSED) | set(REFUSED) == known == set(RULES)


@pytest.mark.parametrize("request_", sorted(PASSED))
def test_nothing_with_descriptors_or_addresses_is_passed_on(request_: Request) -> None:
    rule = RULES[request_]
    assert rule.fds is not None
    assert max(rule.fds) == 0
    assert max(rule.reply_fds) == 0
    fields = rule.payload.__annotations__
    assert not [name for name in fields if "addr" in name or "iova" in name]


@pytest.fixture
def nothing() -> Device:
    """A device that must not be touched."""
    return Device.__new__(Device)


@pytest.mark.parametrize("request_", sorted(REFUSED))
def test_refusal_names_the_request_and_the_reason(
    request_: Request, nothing: Device
) -> None:
    handler = bind(nothing)[request_]
    with pytest.raises(RequestRefused) as refused:
        handler(Empty(), [])
    assert str(refused.value) == f"{request_.name}: {REFUSED[request_]}"


def test_every_request_has_a_handler(nothing: Device) -> None:
    assert set(bind(nothing)) == set(Request)


@pytest.mark.parametrize("request_", sorted({**HANDLED, **PASSED}))
def test_handler_returns_what_its_rule_says(request_: Request) -> None:
    """A payload for a reply; nothing for an ack, which is the library's business."""
    handler = {**HANDLED, **PASSED}[request_]
    returned = inspect.signature(handler).return_annotation
    assert returned == ("Result" if RULES[request_].ack is Ack.REPLY else "None")
