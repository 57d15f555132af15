# SPDX-License-Identifier: Apache-2.0
"""Waiting for the chains that a back has fetched, when a ring stops.

Some back-ends answer GET_VRING_BASE at once and go on working on their requests, or die
of them later. So the first wait is before that message, by the back's event index, and
the second one after it, by the base in the back's answer.
"""

from __future__ import annotations

import select
import time

from ..dataplane.pump import Pump
from ..dataplane.worker import Worker
from ..errors import BackLost
from ..vhost.fds import HasFileno, drain
from .back import Back

QUIET = 0.1
"""Seconds without a completion after which a back that does not tell how far it has
fetched is asked to stop; also between looks if it does."""
TICK = 0.002
"""Seconds between looks at a ring whose back signals no completions any more."""


def await_fetched(pump: Pump, back: Back, events: HasFileno, deadline: float) -> None:
    """Wait until the chains that the back has fetched are done, as far as it tells.

    A worker runs the pump and signals `events` when it is drained. BackLost if the back
    hangs up. `deadline` is a time of time.monotonic().
    """
    poll = select.poll()
    poll.register(events.fileno(), select.POLLIN)
    poll.register(back.fileno(), select.POLLRDHUP)
    quiet_since, seen = time.monotonic(), pump.outstanding
    while not pump.drained:
        now = time.monotonic()
        if pump.outstanding != seen:
            quiet_since, seen = now, pump.outstanding
        end = deadline if pump.tells else min(deadline, quiet_since + QUIET)
        if now >= end:
            return
        # A back that fetches without a word may make its last word untrue meanwhile.
        for fd, _ in poll.poll(min(end - now, QUIET) * 1000):
            if fd != events.fileno():
                raise BackLost("back-end: closed the connection")
            drain(events)


def collect(pump: Pump) -> None:
    """Take all completions that the back has shown; no worker runs the pump, and it
    takes no chains. The worker calls the guest, if it wants that.
    """
    moved = 1
    while pump.drains and moved:
        moved, call, _ = pump.step()
        if call:
            pump.call()


def await_done(
    pump: Pump, back: Back, worker: Worker, base: int, deadline: float
) -> None:
    """Wait until as many chains are done as the back has fetched by the base that it
    has answered.

    It signals completions no more, so they are looked for. BackLost if it hangs up.
    """
    poll = select.poll()
    poll.register(back.fileno(), select.POLLRDHUP)
    while True:
        with worker.pause():
            collect(pump)
            owed = pump.owes(base)
        if owed <= 0 or time.monotonic() >= deadline:
            return
        if poll.poll(TICK * 1000):
            raise BackLost("back-end: closed the connection")
