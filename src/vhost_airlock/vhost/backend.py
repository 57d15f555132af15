# SPDX-License-Identifier: Apache-2.0
"""The back-end's role: a handler for each request, and the loop that calls them.

A back-end that has nothing to tell but its features:

    listener = socket.socket(socket.AF_UNIX)
    listener.bind("/tmp/vhost.sock")
    listener.listen()
    with Channel(listener.accept()[0], peer="front") as channel:
        Backend(channel, {
            Request.GET_FEATURES: lambda payload, fds: U64(Feature.VERSION_1),
            Request.SET_FEATURES: lambda payload, fds: None,
            Request.SET_OWNER: lambda payload, fds: None,
        }).serve()

A handler gets the payload as its `wire` class, checked against the request's rule, and
the list of descriptors that came with it. It takes a descriptor by taking it out of the
list; what it leaves is closed. It returns the reply's payload, an `Answer` when
descriptors go with it, or None when the request has no reply of its own. Acks are not
its business. It raises `RequestRefused` when it can't do what was asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import Disconnected, ProtocolError, RequestRefused
from .channel import Answer, Channel, Message
from .fds import Fd
from .rules import (
    FAILURE,
    RULES,
    SUCCESS,
    Ack,
    AnyRequest,
    AnyRules,
    Rule,
    check,
    payload_limit,
    permit,
)
from .wire import REPLY_FLAGS, U64, Payload, ProtocolFeature, Request

log = logging.getLogger(__name__)

NOTHING = ProtocolFeature(0)

Result = Payload | Answer | None
Handler = Callable[[Any, list[Fd]], Result]


class Responder:
    """Serves the requests that arrive on one channel, by the rules of its direction.

    `Backend` serves a front-end. With BACKEND_RULES and the protocol features that were
    negotiated on the main channel, this class serves a back-end's own requests.

    What happens to a request that is refused, because there is no handler or it says
    so, because nobody knows the request, or because it needs a feature that was not
    offered:

    - It gets the reply that says no, if it has a reply that can (GET_CONFIG: nothing).
    - It gets the ack 1, if its sender asked for an ack.
    - Otherwise its sender can't be told, and would go on as if all were well: that ends
      the connection, with `ProtocolError`.
    """

    def __init__(
        self,
        channel: Channel,
        handlers: Mapping[Any, Handler],
        rules: AnyRules,
        features: ProtocolFeature = NOTHING,
    ) -> None:
        self.channel = channel
        self.handlers = handlers
        self.rules = rules
        self.protocol_features = features
        """The features in use."""
        self.offered = features
        """The features that requests can need: front-ends ask before they accept."""
        self._requests: dict[int, AnyRequest] = {int(name): name for name in rules}
        self._refused: set[int] = set()
        self._limit = payload_limit(rules)

    def serve(self) -> None:
        """Serve until the peer closes its end."""
        try:
            while True:
                self.handle_one()
        except Disconnected as error:
            log.debug("%s", error)

    def handle_one(self, deadline: float | None = None) -> None:
        """Wait for one request, and serve it."""
        with self.channel.recv(deadline, self._limit) as message:
            rule = self.rules.get(message.request)
            try:
                request, payload = self._accept(message, rule)
                result = self._perform(request, payload, message.fds)
            except RequestRefused as refused:
                self._refuse(message, rule, refused)
            else:
                answer = result if isinstance(result, Answer) else Answer(result)
                with answer:
                    self._reply(message, self.rules[request], answer)

    def _accept(self, message: Message, rule: Rule | None) -> tuple[AnyRequest, Any]:
        """Check a message: which request is it, and what is its payload?"""
        if message.reply:
            raise ProtocolError(
                f"{self.channel.peer}: sent a reply ({message.request}) to nothing"
            )
        request = self._requests.get(message.request)
        if request is None or rule is None:
            raise RequestRefused(f"nobody knows request {message.request}")
        permit(request, rule, self.offered)
        try:
            return request, check(request, rule, message.payload, len(message.fds))
        except ProtocolError as error:
            raise ProtocolError(f"{self.channel.peer}: {error}") from None

    def _perform(self, request: AnyRequest, payload: Any, fds: list[Fd]) -> Result:
        """Let the handler do it."""
        handler = self.handlers.get(request)
        if handler is None:
            raise RequestRefused(f"{request.name} isn't supported")
        return handler(payload, fds)

    def _reply(self, message: Message, rule: Rule, answer: Answer) -> None:
        """Send what is due when a request was done."""
        if rule.ack is not Ack.REPLY:
            if answer.payload is not None or answer.fds:
                raise TypeError(f"request {message.request} has no reply of its own")
            payload = message.payload if rule.ack is Ack.ECHO else SUCCESS.pack()
        elif (
            isinstance(answer.payload, rule.reply) and len(answer.fds) in rule.reply_fds
        ):
            payload = answer.payload.pack()
        else:
            raise TypeError(f"{answer} is no reply to request {message.request}")
        if self._due(message, rule):
            self._send(message, payload, answer.fds)

    def _refuse(
        self, message: Message, rule: Rule | None, refused: RequestRefused
    ) -> None:
        """Tell a request's sender that it was refused, or hang up."""
        # Once each, or a peer could fill the log; those that nobody knows are one.
        kind = message.request if message.request in self._requests else -1
        level = logging.DEBUG if kind in self._refused else logging.WARNING
        self._refused.add(kind)
        log.log(level, "%s: refused: %s", self.channel.peer, refused)
        refusal = FAILURE if rule is None else rule.refusal
        if refusal is None or not self._due(message, rule):
            raise ProtocolError(
                f"{self.channel.peer}: can't be told no: {refused}"
            ) from refused
        self._send(message, refusal.pack(), [])

    def _due(self, message: Message, rule: Rule | None) -> bool:
        """Does the sender of this message wait for something?"""
        if rule is not None and rule.answered:
            return True
        return message.need_reply and (
            ProtocolFeature.REPLY_ACK in self.protocol_features
        )

    def _send(self, message: Message, payload: bytes, fds: list[Fd]) -> None:
        self.channel.send(message.request, payload, fds, flags=REPLY_FLAGS)


class Backend(Responder):
    """Serves a front-end.

    It learns which protocol features are offered and in use from the messages that go
    through it. SET_PROTOCOL_FEATURES is acked by the features that it sets, as real
    back-ends do: it is the message that switches acks on.
    """

    def __init__(self, channel: Channel, handlers: Mapping[Request, Handler]) -> None:
        super().__init__(channel, handlers, RULES)

    def _perform(self, request: AnyRequest, payload: Any, fds: list[Fd]) -> Result:
        result = super()._perform(request, payload, fds)
        if request is Request.GET_PROTOCOL_FEATURES and isinstance(result, U64):
            self.offered = ProtocolFeature(result.value)
        elif request is Request.SET_PROTOCOL_FEATURES:
            self.protocol_features = ProtocolFeature(payload.value)
        return result
