# SPDX-License-Identifier: Apache-2.0
"""When a worker polls: on hosts that are made up, and whose clock is too."""

from __future__ import annotations

import pytest

from vhost_airlock.dataplane.polling import Polling

US = 1_000
MS = 1_000_000
SECOND = 1_000_000_000
LONGEST = 200 * US


class Host:
    """A busy guest, of which so many chains a second are moved in either way."""

    def __init__(self, *, polling: float, sleeping: float) -> None:
        self.rate = {True: polling, False: sleeping}
        self.polling = Polling(LONGEST)
        self.now = 5 * SECOND
        self._moved = 0.0

    def run(self, seconds: float, look: int = 100 * US) -> float:
        """Let time go on, and look as often; return the part of it that was polled."""
        polled = 0
        end = self.now + int(seconds * SECOND)
        while self.now < end:
            self.polling.learn(50 * US)
            polls = self.polling.pays(self.now, int(self._moved))
            polled += polls * look
            self._moved += self.rate[polls] * look / SECOND
            self.now += look
        return polled / (seconds * SECOND)


class TestHowLong:
    def test_it_grows_with_sleeps_that_polling_would_have_spared(self):
        polling = Polling(LONGEST)
        windows = []
        for _ in range(6):
            polling.learn(LONGEST)
            windows.append(polling.now)
        assert windows == [20 * US, 40 * US, 80 * US, 160 * US, LONGEST, LONGEST]

    def test_one_longer_sleep_ends_it(self):
        polling = Polling(LONGEST)
        polling.learn(LONGEST)
        polling.learn(LONGEST + 1)
        assert polling.now == 0
        assert not polling.pays(1, 0)

    def test_it_does_not_poll_before_it_has_slept(self):
        assert not Polling(LONGEST).pays(1, 0)

    def test_zero_is_never(self):
        polling = Polling(0)
        for now in range(SECOND, 3 * SECOND, MS):
            polling.learn(1)
            assert not polling.pays(now, now // MS)


class TestWhether:
    def test_it_polls_where_that_moves_more(self):
        host = Host(polling=50_000, sleeping=20_000)
        host.run(1)
        assert host.run(60) > 0.98

    def test_it_sleeps_where_that_moves_more(self):
        host = Host(polling=20_000, sleeping=50_000)
        host.run(1)
        assert host.run(60) < 0.02

    @pytest.mark.parametrize("better", [True, False], ids=["polling", "sleeping"])
    def test_a_host_can_change(self, better):
        host = Host(polling=30_000, sleeping=30_000)
        host.rate[not better] = 60_000
        host.run(60)
        host.rate[better] = 120_000
        host.run(9)
        assert (host.run(1) > 0.9) is better

    def test_a_little_more_is_no_reason(self):
        """Else noise would decide, and what is learned be lost again and again."""
        host = Host(polling=50_000, sleeping=53_000)
        host.run(1)
        assert host.run(60) > 0.98

    def test_who_has_little_to_do_polls_as_its_sleeps_say(self):
        host = Host(polling=500, sleeping=1_000)
        assert host.run(60) > 0.6
        host.rate = {True: 5_000, False: 50_000}
        host.run(1)
        assert host.run(10) < 0.05, "the next trial was not put off"

    def test_pauses_say_nothing(self):
        """Chains moved in slices that took far too long do not count."""
        host = Host(polling=10_000, sleeping=1_000_000)
        host.run(60, look=50 * MS)
        host.rate = {True: 50_000, False: 50_000}
        assert host.run(10) > 0.95
