# SPDX-License-Identifier: Apache-2.0
"""Every exception of vhost-airlock; its class says how much it ends.

    AirlockError
    ├── StartError             the process can't start
    │   └── UsageError         ... because of its arguments
    ├── SessionError           a session: one front, its back, and all between
    │   ├── ProtocolError      ... a peer broke the protocol
    │   │   └── PeerRefused    ... a peer answered a request with an error
    │   ├── Disconnected       ... a peer is gone
    │   │   ├── FrontLost      ... the VMM
    │   │   └── BackLost       ... the back-end
    │   └── DeadlineExceeded   ... a peer did not answer in time
    │       └── BackLate       ... the back-end; it is a BackLost too
    ├── RequestRefused         one message; the connection lives on
    ├── Stopped                nothing: we were told to stop while we waited idly
    └── Interrupted            nothing: an order came while we waited idly

The text of each is one line that names the peer, the request, the field and the value,
as far as they are known. The log shows that line.
"""


class AirlockError(Exception):
    """The base of all exceptions of this package."""

    status = 1
    """The exit status of a command that it ends."""


class StartError(AirlockError):
    """The process can't start: one line on stderr, status 1."""


class UsageError(StartError):
    """The arguments make no sense: one line on stderr, status 2."""

    status = 2


class SessionError(AirlockError):
    """The session ends. The process and other sessions go on."""


class ProtocolError(SessionError):
    """A peer broke the protocol, so nothing that it says can be relied on any more."""


class PeerRefused(ProtocolError):
    """A peer answered a request with an error value.

    Back-ends end their side after most of these, or are left half set up, so this ends
    the session too, unless the code that asked catches it.
    """


class Disconnected(SessionError):
    """The peer closed its socket, or can't be reached at all."""


class FrontLost(Disconnected):
    """The VMM is gone, on the connection that the session is about."""


class BackLost(Disconnected):
    """The back-end is gone, on the connection that the session is about."""


class DeadlineExceeded(SessionError):
    """A peer did not answer, or did not read, in the time that it has."""


class BackLate(BackLost, DeadlineExceeded):
    """The back-end did not answer in time, and so it is of no use any more."""


class RequestRefused(AirlockError):
    """One request can't be done: its sender is told, if it asked; nothing else ends."""


class Stopped(AirlockError):
    """Our own stop event came while we waited for a peer that owed us nothing."""


class Interrupted(AirlockError):
    """An order of our owner came while we waited for a peer that owed us nothing."""
