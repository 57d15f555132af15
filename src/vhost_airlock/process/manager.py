# SPDX-License-Identifier: Apache-2.0
"""The service manager: sockets that it has made for us, and news of us for it.

Both are protocols of systemd, which others speak too: sd_listen_fds(3) and
sd_notify(3). They begin with variables of the environment, which are taken out of it,
so that a back-end that the airlock starts does not think that they are its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import MutableMapping

from ..errors import StartError
from ..log import Logger
from .sockets import reason_of

log = Logger(__name__)

VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
FIRST = 3
"""The number of the first socket; the others follow."""
MOST = 64
"""More sockets than any service manager would pass by mistake."""
FRONT, BACK, STATS, CONTROL = "front", "back", "stats", "control"
NAMES = (FRONT, BACK, STATS, CONTROL)
"""FileDescriptorName= of the sockets for the VMM, the back-end, readers of stats, and
commands.
"""


def take_sockets(environ: MutableMapping[str, str]) -> dict[str, int]:
    """Return the sockets that were passed to this process: names to numbers.

    One socket may have another name, or none, and then is that of the front. The
    variables are taken out of the environment, also those for another process.
    StartError if they make no sense.
    """
    process, count, names, _ = (environ.pop(name, None) for name in VARIABLES)
    if process is None or count is None:
        return {}
    if _number("LISTEN_PID", process) != os.getpid():
        return {}
    passed = _number("LISTEN_FDS", count)
    if passed > MOST:
        raise StartError(f"LISTEN_FDS={count}: more than {MOST} sockets")
    given = names.split(":") if names else [""] * passed
    if len(given) != passed:
        raise StartError(f"LISTEN_FDNAMES={names}: not {passed} names")
    return _by_name(given)


def _by_name(given: list[str]) -> dict[str, int]:
    """Return the names of NAMES, with the numbers of the sockets that have them."""
    sockets: dict[str, int] = {}
    for number, name in enumerate(given, FIRST):
        known = name if name in NAMES else FRONT
        if known in sockets:
            raise StartError(
                f"the service manager passes two sockets for one side ({known}):"
                f" descriptors {sockets[known]} and {number}; their FileDescriptorName="
                f" must be one of {', '.join(NAMES)}"
            )
        sockets[known] = number
    return sockets


def _number(variable: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise StartError(f"{variable}={text}: no number")
    return int(text)


class Manager:
    """Is told how we are, if there is one: at a socket with this address.

    The connection is made at once, since the sandbox would deny it later. The manager
    is never waited for: what it has no room for is lost.
    """

    def __init__(self, address: str | None) -> None:
        self._socket: socket.socket | None = None
        if address is None:
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            # @ begins the address of a socket that has no path.
            sock.connect("\0" + address[1:] if address[0:1] == "@" else address)
        except OSError as error:
            sock.close()
            log.warning(
                "the service manager is told nothing: NOTIFY_SOCKET=%s: %s",
                address,
                reason_of(error),
            )
            return
        self._socket = sock

    def tell(self, *news: str) -> None:
        """Tell it assignments, as READY=1 and STATUS=words for an operator."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
                self._socket.send("\n".join(news).encode(), flags)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
