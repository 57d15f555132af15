# SPDX-License-Identifier: Apache-2.0
"""Is the back-end another user than the airlock and the VMM?

If it is not, it needs no vhost-user to get at the guest's memory, and everything that
the airlock does is in vain: a process can open the memory of a VMM of its own user
under /proc, and take the place of an airlock of its own user, at the airlock's socket.
"""

from __future__ import annotations

import os
from collections.abc import Collection

from ..errors import SessionError
from ..log import Logger

UNKNOWN = 65534
"""The number that the kernel gives to users who have none in this user namespace."""
EVERY_USER = ["0", "0", str(2**32 - 1)]
"""The map of users of the first namespace, in which every user has a number."""


class Users:
    """Judges back-ends by their users; `require` refuses a back-end, by SessionError,
    of which there is only one warning otherwise.
    """

    def __init__(self, log: Logger, *, require: bool) -> None:
        self.log = log
        self.require = require
        self.own = frozenset(os.getresuid())
        """The airlock's users: real, effective and saved."""
        self.all_known = _maps_every_user()
        """Whether UNKNOWN is a user like any other."""
        self._told = False

    def check(self, back: Collection[int], front: int) -> None:
        """Judge a back-end with these users, none if they are not known, between the
        airlock and a VMM of the user `front`.
        """
        trouble = self._trouble(frozenset(back), front)
        if not trouble:
            return
        if self.require:
            raise SessionError(f"back-end: refused, since {trouble}")
        if not self._told:
            self.log.warning(
                "back-end: isolated in vain, since %s; run it as another user", trouble
            )
            self._told = True

    def _trouble(self, back: frozenset[int], front: int) -> str:
        """Return the reason why this back-end is not isolated; "": there is none."""
        if 0 in back:
            return "it runs as root, and can open the guest's memory under /proc"
        if not back or (UNKNOWN in back and not self.all_known):
            return "its user is not known here, and may be root or the VMM's"
        if front in back:
            return (
                f"it runs as the VMM's user ({front}), and can open the guest's memory"
                " under /proc"
            )
        if same := back & self.own:
            return (
                f"it runs as the airlock's user ({min(same)}), and can take the"
                " airlock's place at its socket"
            )
        return ""


def _maps_every_user() -> bool:
    """Does each user of the system have a number in our user namespace?"""
    try:
        with open("/proc/self/uid_map") as file:
            return file.read().split() == EVERY_USER
    except OSError:
        return False
