# SPDX-License-Identifier: Apache-2.0
"""The front's socket for requests of the back: it is told when its configuration space
has changed.
"""

from __future__ import annotations

import socket

from ..errors import AirlockError, DeadlineExceeded, RequestRefused
from ..log import Logger
from ..vhost.channel import Channel
from ..vhost.fds import Fd
from ..vhost.frontend import Requester
from ..vhost.rules import BACKEND_RULES
from ..vhost.wire import BackendRequest, ProtocolFeature


class FrontRequests:
    """Tells the front, once it has sent its socket. Nothing here waits for it."""

    def __init__(self, log: Logger) -> None:
        self.log = log
        self._requester: Requester | None = None

    def connect(self, fd: Fd) -> None:
        """Use the front's socket; it replaces an older one.

        RequestRefused if the descriptor is no socket.
        """
        try:
            ours = socket.socket(fileno=fd.fileno())
        except OSError as error:
            fd.close()
            raise RequestRefused(f"SET_BACKEND_REQ_FD: {error.strerror}") from None
        fd.release()
        self.close()
        self._requester = Requester(Channel(ours, peer="VMM"), BACKEND_RULES)

    def config_changed(self, features: ProtocolFeature) -> None:
        """Tell the front, if `features`, those it has accepted, allow for it.

        It must not be asked to ack: it may be asking us just now.
        """
        if self._requester is None or ProtocolFeature.CONFIG not in features:
            return
        self._requester.protocol_features = features
        try:
            self._requester.exchange(
                BackendRequest.CONFIG_CHANGE_MSG, need_reply=False, timeout=0
            )
        except DeadlineExceeded:
            pass  # its socket is full: of the same message, which says it as well
        except AirlockError as error:
            self.log.warning(
                "the VMM is told of no more changes of the configuration space: %s",
                error,
            )
            self.close()

    def close(self) -> None:
        if self._requester is not None:
            self._requester.close()
            self._requester = None
