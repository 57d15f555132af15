# SPDX-License-Identifier: Apache-2.0
"""Plays the trace of a front-end, with a guest that works between its phases.

with BlkGuest() as guest, Player(QEMU, guest, airlock.channel) as player:
    player.play()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from tests.traces.guests import Guest, Pending
from tests.traces.speaker import Speaker
from tests.traces.vmms import Vmm
from vhost_airlock.vhost.channel import Channel

PHASES = (
    ("start",),
    ("pause", "resume"),
    ("reset", "start"),
    ("plug", "unplug"),
    ("reconnect",),
    ("pause", "resume"),
    ("reset", "start"),
    ("close",),
)
"""Those that stand together are left out together, if the front-end lacks the first."""


class Player:
    """One front-end with its guest.

    `dial` makes a connection to the back-end, or to an airlock before it.
    """

    def __init__(self, vmm: Vmm, guest: Guest, dial: Callable[[], Channel]) -> None:
        self.vmm = vmm
        self.guest = guest
        self.dial = dial
        self.speaker = Speaker(vmm, guest)
        self.speaker.connect(dial())
        self._late: Pending
        """A request that was made while the rings were stopped."""

    def play(self) -> None:
        """Play all phases, and let the guest work wherever its rings run."""
        self.speaker.say(self.vmm.connect)
        for phases in PHASES:
            if not getattr(self.vmm, phases[0]):
                continue
            for phase in phases:
                getattr(self, phase)()
                self.settle()
            if phases[0] != "close":
                self.guest.work()

    def start(self) -> None:
        self.speaker.say(self.vmm.start)

    def pause(self) -> None:
        """Stop. The last chain that the guest offers is seen when it is resumed."""
        self.speaker.say(self.vmm.pause)
        self.settle()
        self._late = self.guest.begin()

    def resume(self) -> None:
        self.speaker.say(self.vmm.resume)
        self._late()

    def reset(self) -> None:
        self.speaker.say(self.vmm.reset)
        self.settle()
        self.guest.reset()

    def plug(self) -> None:
        region = self.guest.plug()
        self.speaker.say(self.vmm.plug)
        self.settle()
        self.guest.work()
        if self.vmm.unplug:
            self.guest.unplug(region)
            self.speaker.gone = region

    def unplug(self) -> None:
        self.speaker.say(self.vmm.unplug)

    def reconnect(self) -> None:
        """Lose the connection. Meanwhile the guest, which doesn't know, goes on."""
        if not self.vmm.offers_again:
            self.guest.rest()
        self.speaker.hang_up()
        self.speaker.connect(self.dial())
        self.guest.lost()
        end = self.guest.begin() if self.vmm.offers_again else None
        self.speaker.say(self.vmm.reconnect)
        if end is not None:
            end()

    def close(self) -> None:
        self.speaker.say(self.vmm.close)

    def settle(self) -> None:
        """Let all that was said take effect, by a message that real front-ends lack.

        Those which ask for no acks don't know when it has, but a real guest takes its
        time before it does the next thing.
        """
        self.speaker.front.barrier()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.speaker.close()
