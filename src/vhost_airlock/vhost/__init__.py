# SPDX-License-Identifier: Apache-2.0
"""The vhost-user protocol as a library: both roles, and their parts.

`Frontend` sends requests to a back-end, `Backend` serves a front-end. Messages are
declared in `wire`, the rule for each message in `rules`.
"""

from .backend import Backend, Handler, Responder
from .channel import Channel
from .fds import Fd, drain, eventfd, notify
from .frontend import Frontend, Requester
from .message import Answer, Message
from .rules import BACKEND_RULES, RULES
from .wire import BackendRequest, Feature, ProtocolFeature, Request

__all__ = [
    "BACKEND_RULES",
    "RULES",
    "Answer",
    "Backend",
    "BackendRequest",
    "Channel",
    "Fd",
    "Feature",
    "Frontend",
    "Handler",
    "Message",
    "ProtocolFeature",
    "Request",
    "Requester",
    "Responder",
    "drain",
    "eventfd",
    "notify",
]
