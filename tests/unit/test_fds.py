# SPDX-License-Identifier: Apache-2.0
"""Descriptors are closed exactly once."""

import os
import sys

import pytest

from vhost_airlock.vhost.fds import Fd, close_all, drain, eventfd, notify, number_of


def is_open(number):
    return os.path.exists(f"/proc/self/fd/{number}")


def null():
    return Fd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))


def test_close_closes():
    fd = null()
    number = fd.fileno()
    assert is_open(number)
    assert not fd.closed
    fd.close()
    assert not is_open(number)
    assert fd.closed
    with pytest.raises(ValueError, match="closed"):
        fd.fileno()


def test_closed_twice_does_not_close_the_next_owner_of_the_number():
    first = null()
    number = first.fileno()
    first.close()
    with null() as second:
        assert second.fileno() == number
        first.close()
        assert is_open(number)


def test_with_closes():
    with null() as fd:
        number = fd.fileno()
    assert not is_open(number)


def test_release_gives_the_duty_away():
    fd = null()
    number = fd.release()
    fd.close()
    assert is_open(number)
    os.close(number)
    with pytest.raises(ValueError, match="closed"):
        fd.release()


def test_a_number_that_is_gone_already_is_no_error():
    fd = null()
    os.close(fd.fileno())
    fd.close()


def test_dup_leaves_the_original_alone():
    with null() as fd:
        copy = Fd.dup(fd)
        assert copy.fileno() != fd.fileno()
        assert not os.get_inheritable(copy.fileno())
        copy.close()
        assert is_open(fd.fileno())


def test_forgotten_is_closed_and_reported():
    fd = null()
    number = fd.fileno()
    with pytest.warns(ResourceWarning, match=f"unclosed Fd\\({number}\\)"):
        del fd
    assert not is_open(number)


def test_negative_number_is_refused():
    with pytest.raises(ValueError, match="-1"):
        Fd(-1)


def test_repr_tells_the_number():
    fd = null()
    assert repr(fd) == f"Fd({fd.fileno()})"
    fd.close()
    assert repr(fd) == "Fd(closed)"


def test_number_of():
    with null() as fd:
        assert number_of(fd) == number_of(fd.fileno()) == fd.fileno()


def test_close_all():
    fds = [null() for _ in range(3)]
    close_all(fds)
    assert all(fd.closed for fd in fds)


def test_eventfd_counts():
    with eventfd(1) as event:
        assert not os.get_inheritable(event.fileno())
        notify(event)
        notify(event.fileno())
        assert drain(event) == 3
        assert drain(event) == 0


def test_notify_does_not_wait_for_room():
    full = 2**64 - 2
    with eventfd() as event:
        os.write(event.fileno(), full.to_bytes(8, sys.byteorder))
        notify(event)
        assert drain(event) == full


def test_drain_does_not_wait_though_a_peer_made_the_eventfd_block():
    with eventfd() as event:
        os.set_blocking(event.fileno(), True)
        assert drain(event) == 0
