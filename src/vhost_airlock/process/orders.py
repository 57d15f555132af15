# SPDX-License-Identifier: Apache-2.0
"""Orders to take another back-end, which the broker passes on from the control socket.

The order names the back-end for the log alone: the process that gets it could not
connect anywhere. It asks the broker for the next back-end, and adopts it or not.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
from typing import Protocol

from ..proxy.back import Back
from ..proxy.recovery import ConfigChanged
from ..vhost.fds import HasFileno
from .broker import Broker
from .config import ProcessConfig
from .connector import Connector, next_connector
from .control import DONE, FAILED, KIND, LARGEST
from .sockets import OWNER
from .target import Target


class Owner(Protocol):
    """The process that carries orders out, as far as they need it."""

    @property
    def config(self) -> ProcessConfig: ...

    @property
    def stop(self) -> HasFileno: ...

    @property
    def broker(self) -> Broker: ...

    @property
    def connector(self) -> Connector:
        """The way by which back-ends come now."""

    def back_by(
        self,
        connector: Connector,
        config_changed: ConfigChanged,
        until: float,
        answer: float,
    ) -> Back: ...

    def take_connector(self, connector: Connector) -> None: ...


class Orders:
    """The socket at which the broker gives orders, one at a time."""

    def __init__(self, sock: socket.socket, owner: Owner) -> None:
        self._sock = sock
        self._owner = owner

    def fileno(self) -> int:
        return self._sock.fileno()

    def waiting(self) -> bool:
        """Is there an order, or the end of all orders?"""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(0))

    def take(self) -> Order | None:
        """Return the order; None: the broker is gone, and gives no more orders."""
        try:
            told = self._sock.recv(2 * LARGEST, socket.MSG_DONTWAIT)
        except ConnectionError:
            told = b""
        if not told:
            return None
        return Order(Target.parse(json.loads(told)), self._owner, self._sock)

    def close(self) -> None:
        self._sock.close()


class Order:
    """One order: the way to the next back-end, and the answer."""

    def __init__(self, target: Target, owner: Owner, sock: socket.socket) -> None:
        self.beside = target.path is not None
        self._owner = owner
        self._sock = sock
        self._next = next_connector(target, owner.config, owner.stop, owner.broker)

    def connect(self, config_changed: ConfigChanged, until: float) -> Back:
        return self._back_by(self._next, config_changed, until)

    def drop(self) -> None:
        self._next.disconnected()

    def end_last(self) -> None:
        self._owner.connector.disconnected()

    def adopt(self) -> None:
        self._owner.broker.adopt_back()
        self._next.following = False
        self._owner.take_connector(self._next)

    def connect_last(self, config_changed: ConfigChanged, until: float) -> Back:
        return self._back_by(self._owner.connector, config_changed, until)

    def at_work(self) -> str:
        self._owner.connector.disconnected()
        return self._owner.connector.lives()

    def done(self, result: str) -> None:
        self._answer(DONE + os.fsencode(result))

    def failed(self, reason: str) -> None:
        self._answer(FAILED + os.fsencode(reason))

    def _back_by(
        self, connector: Connector, config_changed: ConfigChanged, until: float
    ) -> Back:
        """Return a back by this way; its answer may take all of the time, too."""
        left = until - time.monotonic()
        return self._owner.back_by(connector, config_changed, until, left)

    def _answer(self, answer: bytes) -> None:
        with contextlib.suppress(OSError):  # the broker is gone
            self._sock.send(answer[:LARGEST], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def listen_for_orders(owner: Owner) -> tuple[Orders | None, socket.socket | None]:
    """Let the broker serve the control socket, if the user has named one.

    Returns (the orders that come from there, where readers of stats are handed over).
    Only the airlock's own user can connect, whatever the rights of other sockets are.
    """
    config, broker = owner.config, owner.broker
    if config.control_path is None and config.control_fd is None:
        return None, None
    listener = broker.listen(config.control_path, config.control_fd, OWNER, KIND)
    orders, readers = broker.control(listener)
    return Orders(orders, owner), readers
