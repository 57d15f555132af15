# SPDX-License-Identifier: Apache-2.0
"""The back's side of a device: the back that there is, and the search for another one
when it is lost.

A back is connected when the first message has to go there, and told then what the front
has accepted. When it is lost, another one takes its place that is the device which the
front knows: it is told all that the last one knew, and then the rings start with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from ..errors import BackLost, RequestRefused
from ..vhost.frontend import Frontend
from ..vhost.wire import ProtocolFeature
from .back import Back
from .config import Config
from .deadline import Deadline
from .features import require_modern
from .front_requests import FrontRequests
from .known import Known
from .recovery import Backs, Recovery

Result = TypeVar("Result")


class Owner(Protocol):
    """The device of a back's side, as far as that needs it."""

    def stop_without_back(self) -> None:
        """The back is gone: rings stop, with the chains that it has completed."""

    def start_again(self) -> None:
        """There is another back: start the rings."""


class BackSide:
    """The back's side of one device. `backs` makes the backs, `front` is told when the
    configuration space has changed.
    """

    def __init__(
        self, config: Config, backs: Backs, front: FrontRequests, owner: Owner
    ) -> None:
        self.deadline = Deadline(config)
        self.features: int | None = None
        """Accepted by the front; None: not yet."""
        self.protocol_features = ProtocolFeature(0)
        """Accepted by the front."""
        self._log = config.log
        self._backs = backs
        self._front = front
        self._owner = owner
        self._back: Back | None = None
        self._known: Known | None = None
        self._recovery = Recovery(config)
        self._settled = False
        """Whether the back that was lost was settled: the front may yet choose else."""
        self._swaps = 0
        self._paused = 0.0
        """Seconds in which rings stood still for swaps."""

    @property
    def back(self) -> Back:
        """The back, connected when it is first needed.

        After a loss it is awaited; RequestRefused if none comes until the message at
        hand has to be answered.
        """
        if self._back is None and not self.away:
            self.hold(self._backs.connect(self.on_config_change))
        while self._back is None:
            left = self.deadline.left()
            if left <= 0:
                raise RequestRefused("the back-end is away")
            self._backs.pause(min(left, self._recovery.wait()))
            self.look()
            if self._back is not None and not self.deadline.suffices():
                # A back that is asked now would be late, and lost again for no fault.
                raise RequestRefused("the back-end has only just come back")
        return self._back

    @property
    def connected(self) -> Back | None:
        """The back, if there is one yet."""
        return self._back

    @property
    def settled(self) -> Back | None:
        """The back, if there is one and its protocol features are chosen."""
        back = self._back
        return back if back is not None and back.settled else None

    @property
    def away(self) -> bool:
        """Is the back lost, and another one looked for?"""
        return self._recovery.active

    @property
    def known(self) -> Known:
        """The back's answers that the front got, and the values that it has set."""
        if self._known is None:
            self._known = Known(self.back)
        return self._known

    @property
    def informed(self) -> Back:
        """The back, after sending it all that the front has accepted so far.

        Features without VERSION_1 stay here: others will follow, or no ring will ever
        start.
        """
        self.back.settle(self.protocol_features)
        self._tell_features(self.back)
        return self.back

    @property
    def peer(self) -> Frontend:
        """The back for messages that are passed on: ready for them."""
        return self.informed.peer

    def _tell_features(self, back: Back) -> None:
        """Tell a back the features that the front has accepted, if they are final."""
        if self.features is not None and self._is_modern():
            back.set_features(self.features)

    def _is_modern(self) -> bool:
        try:
            require_modern(self.features or 0)
        except RequestRefused:
            return False
        return True

    def on_config_change(self) -> None:
        """The back says that its configuration space has changed."""
        self.known.config_changed()
        self._front.config_changed(self.protocol_features)

    # The loss of a back.

    def outlive(self, act: Callable[[], Result]) -> Result:
        """Do something, and do it again if the back is lost over it.

        BackLost, or another SessionError, if no other back is looked for.
        """
        while True:
            try:
                return act()
            except BackLost as lost:
                self.lose(lost)

    def lose(self, lost: BackLost) -> None:
        """Go on without a back, or raise what was given."""
        self._recovery.begin(lost)
        self.let_go()

    def let_go(self) -> None:
        """Close the back. Rings stop without it, if they have not stopped yet."""
        back = self.release()
        self._owner.stop_without_back()
        if back is not None:
            self._settled = back.settled
            back.close()

    def release(self) -> Back | None:
        """Return the back, if there is one; there is none from now on."""
        back, self._back = self._back, None
        self.deadline.apply_to(None)
        return back

    def look(self) -> None:
        """Look for another back, if that is due, and put it in the place of the last.

        SessionError if that can't be, or if none comes.
        """
        back = self._recovery.attempt(
            lambda: self._backs.reconnect(self.on_config_change)
        )
        if back is None:
            return
        self.hold(back)
        with self.deadline.aside():
            try:
                grown = self.introduce(back, settled=self._settled)
                seconds = self._recovery.end()
                self._owner.start_again()
                self.known.tell_ready(back.peer)
            except BackLost as another:
                self.lose(another)
            else:
                self._log.warning("back-end: it is back, after %.1f s", seconds)
                if grown:
                    self.tell_grown()

    def wait(self) -> float:
        """Seconds until look() has something to do, when the back is away."""
        return self._recovery.wait()

    # Another back in the place of one; see swap.py too.

    def introduce(self, back: Back, *, settled: bool) -> bool:
        """Tell another back all that the last one knew, but for the rings. `settled`:
        the last one was.

        Returns whether its capacity has grown. SessionError if it is not the device
        that the front knows.
        """
        back.peer.until = self.deadline.until
        if settled:
            back.settle(self.protocol_features)
        grown = self.known.require(back)
        if settled:
            self._tell_features(back)
            self.known.tell(back.peer)
            back.show_memory()
        return grown

    def tell_grown(self) -> None:
        """Tell the front, which reads the configuration space again then."""
        self._log.warning("back-end: its capacity has grown; the VMM is told")
        self._front.config_changed(self.protocol_features)

    def hold(self, back: Back) -> None:
        """This is the back from now on."""
        self._back = back
        self.deadline.apply_to(back.peer)

    def search_anew(self) -> None:
        """Look for another back at once: it has come by another way."""
        self._recovery.hurry()

    def swapped(self, seconds: float) -> None:
        """Another back has taken the place of one, after a pause."""
        self._swaps += 1
        self._paused += seconds

    def counters(self) -> dict[str, int]:
        """The numbers of losses and swaps, and their time. Any thread may ask."""
        return self._recovery.counters() | {
            "swaps": self._swaps,
            "paused": int(self._paused * 1e9),
        }
