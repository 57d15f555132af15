# SPDX-License-Identifier: Apache-2.0
"""The back-end's role: a handler for each request, and the loop that calls them.

A back-end that has features, and no device:

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
list; descriptors left there are closed. It returns the reply's payload, an `Answer`
when descriptors go with that, or None when the request has no reply of its own. The
loop sends acks. A handler raises `RequestRefused` when it can't do the request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import Disconnected, ProtocolError, RequestRefused
from ..log import DEBUG, WARNING, Logger
from .channel import Channel
from .fds import Fd
from .message import Answer, Message
from .rules import (
    FAILURE,
    RULES,
    SUCCESS,
    Ack,
    AnyRequest,
    AnyRules,
    Rule,
    check,
    examine,
    payload_limit,
    permit,
)
from .wire import REPLY_FLAGS, U64, Payload, ProtocolFeature, Request

log = Logger(__name__)

NOTHING = ProtocolFeature(0)

Result = Payload | Answer | None
Handler = Callable[[Any, list[Fd]], Result]


class Responder:
    """Serves the requests that arrive on one channel, by the rules of its direction.

    `Backend` serves a front-end. With BACKEND_RULES and the protocol features that were
    negotiated on the main channel, this class serves a back-end's own requests.

    A request is refused if it has no handler or the handler refuses it, if its number
    is unknown, if it needs a feature that was not offered, or if its values make no
    sense. Then:

    - It gets the reply that says no, if its rule has one (GET_CONFIG: an empty one).
    - It gets the ack 1, if its sender asked for an ack.
    - Otherwise its sender can't be told, and would go on as if the request had taken
      effect: that ends the connection, with `ProtocolError`.
    """

    def __init__(
        self,
        channel: Channel,
        handlers: Mapping[Any, Handler],
        rules: AnyRules,
        features: ProtocolFeature = NOTHING,
        log: Logger = log,
    ) -> None:
        self.channel = channel
        self.handlers = handlers
        self.rules = rules
        self.log = log
        self.protocol_features = features
        """The features in use."""
        self.offered = features
        """The features that requests can need: front-ends send such requests before
        they accept the features."""
        self._requests: dict[int, AnyRequest] = {int(name): name for name in rules}
        self._refused: set[int] = set()
        self._limit = payload_limit(rules)

    def serve(self) -> None:
        """Serve until the peer closes its end."""
        try:
            while True:
                self.handle_one()
        except Disconnected as error:
            self.log.debug("%s", error)

    def handle_one(self, deadline: float | None = None) -> None:
        """Wait for one request, and serve it."""
        self._serve(self.channel.recv(deadline, self._limit), None)

    def handle_now(self) -> bool:
        """Serve one request if it has come whole; False if it has not. Never waits.

        The beginning of a request is kept until the rest comes. Raises
        `DeadlineExceeded` if there is no room in the socket for its reply or ack.
        """
        message = self.channel.recv_now(self._limit)
        if message is None:
            return False
        self._serve(message, time.monotonic())
        return True

    def _serve(self, message: Message, deadline: float | None) -> None:
        """Serve a request; its reply or ack is sent by the deadline."""
        rule = self.rules.get(message.request)
        with message:
            try:
                request, payload = self._accept(message, rule)
                result = self._perform(request, payload, message.fds)
            except RequestRefused as refused:
                self._send(message, self._refusal(message, rule, refused), [], deadline)
                return
            with result if isinstance(result, Answer) else Answer(result) as answer:
                reply = self._reply(request, payload, answer)
                if self._due(message, rule):
                    self._send(message, reply, answer.fds, deadline)

    def _accept(self, message: Message, rule: Rule | None) -> tuple[AnyRequest, Any]:
        """Check a message; return (its request, its payload)."""
        if message.reply:
            raise ProtocolError(
                f"{self.channel.peer}: sent a reply ({message.request}) to nothing"
            )
        request = self._requests.get(message.request)
        if request is None or rule is None:
            raise RequestRefused(f"request {message.request} is unknown")
        permit(request, rule, self.offered)
        try:
            payload = check(request, rule, message.payload, len(message.fds))
        except ProtocolError as error:
            raise ProtocolError(f"{self.channel.peer}: {error}") from None
        examine(request, rule, payload)
        return request, payload

    def _perform(self, request: AnyRequest, payload: Any, fds: list[Fd]) -> Result:
        """Call the request's handler; return its result."""
        handler = self.handlers.get(request)
        if handler is None:
            raise RequestRefused(f"{request.name} isn't supported")
        return handler(payload, fds)

    def _reply(self, request: AnyRequest, payload: Payload, answer: Answer) -> Payload:
        """Return the reply or ack to a request that was done."""
        rule = self.rules[request]
        if rule.ack is not Ack.REPLY:
            if answer.payload is not None or answer.fds:
                raise TypeError(f"request {int(request)} has no reply of its own")
            return payload if rule.ack is Ack.ECHO else SUCCESS
        reply: Payload = answer.payload
        if not isinstance(reply, rule.reply) or len(answer.fds) not in rule.reply_fds:
            raise TypeError(f"{answer} is no reply to request {int(request)}")
        return reply

    def _refusal(
        self, message: Message, rule: Rule | None, refused: RequestRefused
    ) -> Payload:
        """Return the reply or ack that says no. ProtocolError if there is none."""
        # One line a request, or a peer could fill the log; unknown ones share a line.
        kind = message.request if message.request in self._requests else -1
        level = DEBUG if kind in self._refused else WARNING
        self._refused.add(kind)
        self.log.log(level, "%s: refused: %s", self.channel.peer, refused)
        refusal = FAILURE if rule is None else rule.refusal
        if refusal is None or not self._due(message, rule):
            raise ProtocolError(
                f"{self.channel.peer}: can't be told no: {refused}"
            ) from refused
        return refusal

    def _due(self, message: Message, rule: Rule | None) -> bool:
        """Does the sender of this message wait for a reply or ack?"""
        if rule is not None and rule.answered:
            return True
        return message.need_reply and (
            ProtocolFeature.REPLY_ACK in self.protocol_features
        )

    def _send(
        self,
        message: Message,
        reply: Payload,
        fds: list[Fd],
        deadline: float | None,
    ) -> None:
        self.channel.send(
            message.request, reply.pack(), fds, flags=REPLY_FLAGS, deadline=deadline
        )


class Backend(Responder):
    """Serves a front-end.

    It learns the protocol features that are offered and in use from the messages that
    go through it. SET_PROTOCOL_FEATURES is acked if REPLY_ACK is among the features
    that it sets, as by real back-ends.

    `remembered` are protocol features that a front-end may use before that, since it
    has negotiated them on an earlier connection: DPDK's virtio-user tells its status
    first when it connects again. It waits for the acks that it had then.
    """

    def __init__(
        self,
        channel: Channel,
        handlers: Mapping[Request, Handler],
        remembered: ProtocolFeature = NOTHING,
        log: Logger = log,
    ) -> None:
        super().__init__(channel, handlers, RULES, log=log)
        self.offered = self._remembered = remembered

    def _perform(self, request: AnyRequest, payload: Any, fds: list[Fd]) -> Result:
        result = super()._perform(request, payload, fds)
        if request is Request.GET_PROTOCOL_FEATURES and isinstance(result, U64):
            self.offered = ProtocolFeature(result.value)
            self._remembered = NOTHING
        elif request is Request.SET_PROTOCOL_FEATURES:
            self.protocol_features = ProtocolFeature(payload.value)
            # Cloud Hypervisor, when it connects again, accepts without having asked.
            self.offered |= self.protocol_features
            self._remembered = NOTHING
        return result

    def _due(self, message: Message, rule: Rule | None) -> bool:
        remembers = rule is not None and bool(rule.needs & self._remembered)
        return super()._due(message, rule) or (message.need_reply and remembers)
