# SPDX-License-Identifier: Apache-2.0
"""The front-end's role: a method for each request.

Ask a back-end for its features, and for its configuration space:

    with Frontend.connect("/tmp/vhost.sock") as back:
        features = back.get_features()
        if features & Feature.PROTOCOL_FEATURES:
            back.negotiate(ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG)
        back.set_owner()
        config = back.get_config(0, 8)

The peer isn't trusted. At most one request is outstanding, a reply must be exactly the
one that is due, and each exchange has a deadline. Descriptors that are passed to
methods stay the caller's; descriptors that methods return are the caller's too.

Several exchanges for one purpose can have one deadline together:

    back.until = time.monotonic() + 5
    back.set_features(features)
    back.set_mem_table(table)
    back.until = None

A request can be posted, if its caller can't wait for the reply. The reply is collected
when the socket is readable, or by the next exchange:

    back.post(Request.ADD_MEM_REG, region, [fd], lambda answer: use(region))
    ...
    back.collect()
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

from ..errors import DeadlineExceeded, PeerRefused, ProtocolError, RequestRefused
from ..record import changeable
from .channel import TIMEOUT, Channel
from .fds import Fd, HasFileno
from .message import Answer, Message
from .rules import RULES, Ack, AnyRequest, AnyRules, Rule, check_reply, permit
from .wire import (
    REPLY_FLAGS,
    U64,
    Config,
    CryptoSession,
    DeviceState,
    Empty,
    HeaderFlag,
    Inflight,
    Iotlb,
    Log,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    Request,
    SharedObject,
    ShmemConfig,
    VringAddr,
    VringFd,
    VringState,
)

AnyFd = int | HasFileno
NOTHING = ProtocolFeature(0)


Done = Callable[[Answer], None]
"""Called with the reply or ack to a request that was posted."""


@changeable
class Owed:
    """A reply or ack that the peer owes."""

    request: AnyRequest
    rule: Rule
    until: float
    """Its deadline, of time.monotonic()."""
    done: Done | None = None
    """None: an exchange waits for the reply, or has waited in vain."""

    def limit(self, request: int) -> int:
        """The size of the largest payload that it may have."""
        return self.rule.reply.MAX_SIZE


class Requester:
    """Sends requests on one channel and receives their replies and acks.

    `Frontend` talks to a back-end. With BACKEND_RULES and the protocol features that
    were negotiated on the main channel, this class lets a back-end ask its front-end.
    """

    def __init__(
        self,
        channel: Channel,
        rules: AnyRules,
        features: ProtocolFeature = NOTHING,
        timeout: float = TIMEOUT,
    ) -> None:
        self.channel = channel
        self.rules = rules
        self.protocol_features = features
        """The features in use."""
        self.timeout = timeout
        """Seconds that the peer has for one request."""
        self.until: float | None = None
        """A time of time.monotonic() beyond which no exchange waits; None: no bound.

        Once it is over, an exchange raises `DeadlineExceeded` before a byte is sent.
        """
        self._owed: Owed | None = None

    def exchange(
        self,
        request: AnyRequest,
        payload: Payload = Empty(),  # noqa: B008 (it can't change)
        fds: Sequence[AnyFd] = (),
        *,
        need_reply: bool = True,
        timeout: float | None = None,
    ) -> Answer:
        """Send a request, wait for the reply or ack that is due, and return it.

        If the request has no reply of its own, and REPLY_ACK or `need_reply` is
        missing, no answer is due, and this returns an `Empty` one. Waits for the reply
        to a posted request first, within the same time.

        Raises `PeerRefused` when the peer says no, `RequestRefused` when the request
        needs a feature that is not in use. Any other exception leaves the channel
        useless.
        """
        permit(request, self.rules[request], self.protocol_features)
        deadline = self._deadline(timeout)
        if self.until is not None and self.until <= time.monotonic():
            raise self.channel.late(
                f"{self.channel.peer}: has left no time for {request.name}"
            )
        self._settle(deadline)
        owed = self._send(request, payload, fds, need_reply, deadline, deadline)
        if owed is None:
            return Answer(Empty())
        return self._take(owed, self._wait_for(owed, deadline))

    def post(
        self,
        request: AnyRequest,
        payload: Payload,
        fds: Sequence[AnyFd],
        done: Done,
        *,
        timeout: float | None = None,
    ) -> None:
        """Send a request without waiting, and call `done` with its reply or ack later.

        That happens in `collect()` or in the next `exchange()`, which raise
        `ProtocolError` instead if the peer says no. If no ack is due, `done` is called
        at once. The caller collects before `owed_until`, which is `timeout` from now.

        Raises `RequestRefused` when the request needs a feature that is not in use, or
        when the peer owes a reply already, and `DeadlineExceeded` when the socket is
        full. In both cases no byte was sent.
        """
        permit(request, self.rules[request], self.protocol_features)
        if self._owed is not None:
            raise RequestRefused(
                f"{request.name}: the reply to {self._owed.request.name} is still owed"
            )
        now = time.monotonic()
        until = now + (self.timeout if timeout is None else timeout)
        owed = self._send(request, payload, fds, True, now, until)
        if owed is None:
            done(Answer(Empty()))
        else:
            owed.done = done

    @property
    def owed_until(self) -> float | None:
        """The deadline of the reply to a posted request; None: there is none owed."""
        owed = self._owed
        return None if owed is None or owed.done is None else owed.until

    def collect(self) -> None:
        """Take the reply to a posted request if it has come whole. Never waits.

        To be called when the socket is readable between exchanges, and at `owed_until`.
        Raises `DeadlineExceeded` if it is `owed_until`, and the reply has not come.
        """
        owed = self._owed
        if owed is None or owed.done is None:
            self.unsolicited()
            return
        message = self.channel.recv_now(owed.limit)
        if message is not None:
            self._finish(owed, message)
        elif owed.until <= time.monotonic():
            raise self.channel.late(
                f"{self.channel.peer}: did not answer in time ({owed.request.name})"
            )

    def unsolicited(self) -> None:
        """Raise if the peer sent a byte, or hung up, while no request was outstanding.

        To be called when the socket is readable between exchanges, by callers that
        never post. `exchange()` calls it too, so that bytes that were sent before a
        request are not taken for its reply.
        """
        if self.channel.pending():
            raise ProtocolError(f"{self.channel.peer}: sent bytes to no request")

    def _deadline(self, timeout: float | None) -> float:
        """Return the time when an exchange that begins now has to be over."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        return deadline if self.until is None else min(deadline, self.until)

    def _send(
        self,
        request: AnyRequest,
        payload: Payload,
        fds: Sequence[AnyFd],
        need_reply: bool,
        deadline: float,
        until: float,
    ) -> Owed | None:
        """Send a request by a deadline; return the answer that is owed `until` another
        time, None if none is.
        """
        self.unsolicited()
        rule = self.rules[request]
        can_ack = ProtocolFeature.REPLY_ACK in self.protocol_features
        waits = rule.answered or (need_reply and can_ack)
        flags = HeaderFlag.VERSION
        if waits and rule.ack in (Ack.ASKED, Ack.ALWAYS):
            flags |= HeaderFlag.NEED_REPLY
        try:
            self.channel.send(
                request, payload.pack(), fds, flags=flags, deadline=deadline
            )
        except DeadlineExceeded as error:
            raise type(error)(f"{error} ({request.name})") from None
        if waits:
            self._owed = Owed(request, rule, until)
        return self._owed

    def _settle(self, deadline: float) -> None:
        """Wait for the reply to a posted request, if one is owed."""
        owed = self._owed
        if owed is None:
            return
        if owed.done is None:
            raise ProtocolError(
                f"{self.channel.peer}: owes the reply to {owed.request.name}"
            )
        self._finish(owed, self._wait_for(owed, min(deadline, owed.until)))

    def _wait_for(self, owed: Owed, deadline: float) -> Message:
        try:
            return self.channel.recv(deadline, owed.limit)
        except DeadlineExceeded as error:
            raise type(error)(f"{error} ({owed.request.name})") from None

    def _finish(self, owed: Owed, message: Message) -> None:
        """Call `done` of a posted request with its reply."""
        assert owed.done is not None
        try:
            answer = self._take(owed, message)
        except PeerRefused as error:
            # An exchange that is under way must not take it for its own answer.
            raise ProtocolError(str(error)) from None
        with answer:
            owed.done(answer)

    def _take(self, owed: Owed, message: Message) -> Answer:
        """Return the owed answer. ProtocolError if the message is another one,
        PeerRefused if it says no.
        """
        try:
            reply = self._check(owed, message)
        except BaseException:
            message.close()
            raise
        self._owed = None
        if owed.rule.refuses(reply, len(message.fds)):
            raise PeerRefused(
                f"{self.channel.peer}: {owed.request.name} refused: {reply}"
            )
        return Answer(reply, message.fds)

    def _check(self, owed: Owed, message: Message) -> Any:
        """Return the payload of a reply. ProtocolError if it isn't the due one."""
        request = owed.request
        if message.request != request or message.flags != REPLY_FLAGS:
            raise ProtocolError(
                f"{self.channel.peer}: instead of the reply to {request.name} came"
                f" message {message.request} with flags {message.flags:#x}"
            )
        try:
            return check_reply(request, owed.rule, message.payload, len(message.fds))
        except ProtocolError as error:
            raise ProtocolError(f"{self.channel.peer}: {error}") from None

    def fileno(self) -> int:
        return self.channel.fileno()

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Frontend(Requester):
    """Talks to a back-end. Each method is the request of the same name in `wire`.

    With REPLY_ACK negotiated, each method returns when the request has taken effect;
    without it, `barrier()` waits until all earlier requests have taken effect.
    """

    def __init__(self, channel: Channel, *, timeout: float = TIMEOUT) -> None:
        super().__init__(channel, RULES, timeout=timeout)

    @classmethod
    def connect(
        cls,
        path: str,
        *,
        peer: str = "back",
        timeout: float = TIMEOUT,
    ) -> Self:
        """Connect to a back-end that listens at a path."""
        channel = Channel.connect(path, peer=peer, timeout=timeout)
        return cls(channel, timeout=timeout)

    def _number(self, request: Request) -> int:
        """Send a request whose reply is a number; return that."""
        value: int = self._ask(request).value
        return value

    def _ask(self, request: Request, payload: Payload = Empty()) -> Any:  # noqa: B008
        """Send a request, and return the reply's payload, of the class in its rule."""
        return self.exchange(request, payload).payload

    # Features.

    def get_features(self) -> int:
        return self._number(Request.GET_FEATURES)

    def set_features(self, features: int) -> None:
        self.exchange(Request.SET_FEATURES, U64(features))

    def get_protocol_features(self) -> ProtocolFeature:
        return ProtocolFeature(self._number(Request.GET_PROTOCOL_FEATURES))

    def set_protocol_features(self, features: int) -> None:
        """Use these protocol features. Acks begin with the next request."""
        self.exchange(Request.SET_PROTOCOL_FEATURES, U64(features), need_reply=False)
        self.protocol_features = ProtocolFeature(features)

    def negotiate(self, wanted: int) -> ProtocolFeature:
        """Use those of the wanted protocol features that the back-end offers, and
        return them.
        """
        features = self.get_protocol_features() & wanted
        self.set_protocol_features(features)
        return features

    def barrier(self) -> None:
        """Wait until all earlier requests have taken effect."""
        self.get_features()

    # The device.

    def set_owner(self) -> None:
        self.exchange(Request.SET_OWNER)

    def reset_owner(self) -> None:
        self.exchange(Request.RESET_OWNER)

    def reset_device(self) -> None:
        self.exchange(Request.RESET_DEVICE)

    def get_status(self) -> int:
        return self._number(Request.GET_STATUS)

    def set_status(self, status: int) -> None:
        self.exchange(Request.SET_STATUS, U64(status))

    def get_config(self, offset: int, size: int, flags: int = 0) -> bytes:
        """Return a piece of the configuration space.

        Raises `RequestRefused` when the back-end has no such piece. Back-ends say so in
        several ways: with no payload, as they should, with no data, or with another
        piece.
        """
        asked = Config(offset, size, flags, bytes(size))
        try:
            reply = self._ask(Request.GET_CONFIG, asked)
        except PeerRefused as error:
            raise RequestRefused(str(error)) from None
        if (reply.offset, reply.size) != (offset, size) or len(reply.data) != size:
            raise RequestRefused(
                f"{self.channel.peer}: GET_CONFIG of {size} bytes at {offset}:"
                f" the reply is {reply} with {len(reply.data)} bytes"
            )
        data: bytes = reply.data
        return data

    def set_config(self, offset: int, data: bytes, flags: int = 0) -> None:
        """Raises `RequestRefused` when the back-end acks that it is read-only."""
        self._offer(Request.SET_CONFIG, Config(offset, len(data), flags, data))

    def send_rarp(self, mac: bytes) -> None:
        self.exchange(Request.SEND_RARP, U64(int.from_bytes(mac, sys.byteorder)))

    def net_set_mtu(self, mtu: int) -> None:
        """Raises `RequestRefused` when the back-end acks that it can't use that MTU."""
        self._offer(Request.NET_SET_MTU, U64(mtu))

    def _offer(self, request: Request, payload: Payload) -> None:
        """Send a request; RequestRefused if a sound back-end says no to it."""
        try:
            self.exchange(request, payload)
        except PeerRefused as error:
            raise RequestRefused(str(error)) from None

    def create_crypto_session(self, session: CryptoSession) -> CryptoSession:
        reply: CryptoSession = self._ask(Request.CREATE_CRYPTO_SESSION, session)
        if len(reply.data) != len(session.data):
            raise ProtocolError(
                f"{self.channel.peer}: CREATE_CRYPTO_SESSION: {len(reply.data)} bytes"
                f" came back of {len(session.data)}"
            )
        return reply

    def close_crypto_session(self, session_id: int) -> None:
        self.exchange(Request.CLOSE_CRYPTO_SESSION, U64(session_id))

    def get_shared_object(self, uuid: bytes) -> Fd:
        """Raises `PeerRefused` when there is no such object."""
        answer = self.exchange(Request.GET_SHARED_OBJECT, SharedObject(uuid))
        return self._only_fd(Request.GET_SHARED_OBJECT, answer)

    def get_shmem_config(self) -> ShmemConfig:
        config: ShmemConfig = self._ask(Request.GET_SHMEM_CONFIG)
        return config

    def set_backend_req_fd(self, fd: AnyFd) -> None:
        self.exchange(Request.SET_BACKEND_REQ_FD, fds=[fd])

    # Memory.

    def get_max_mem_slots(self) -> int:
        return self._number(Request.GET_MAX_MEM_SLOTS)

    def set_mem_table(self, regions: Iterable[tuple[MemoryRegion, AnyFd]]) -> None:
        table = list(regions)
        self.exchange(
            Request.SET_MEM_TABLE,
            MemoryTable(tuple(region for region, _ in table)),
            [fd for _, fd in table],
        )

    def add_mem_region(self, region: MemoryRegion, fd: AnyFd) -> None:
        self.exchange(Request.ADD_MEM_REG, region, [fd])

    def remove_mem_region(self, region: MemoryRegion) -> None:
        self.exchange(Request.REM_MEM_REG, region)

    def iotlb(self, entry: Iotlb) -> None:
        self.exchange(Request.IOTLB_MSG, entry)

    # Vrings.

    def get_queue_num(self) -> int:
        return self._number(Request.GET_QUEUE_NUM)

    def set_vring_num(self, index: int, num: int) -> None:
        self.exchange(Request.SET_VRING_NUM, VringState(index, num))

    def set_vring_addr(self, addr: VringAddr) -> None:
        self.exchange(Request.SET_VRING_ADDR, addr)

    def set_vring_base(self, index: int, base: int) -> None:
        self.exchange(Request.SET_VRING_BASE, VringState(index, base))

    def get_vring_base(self, index: int, *, timeout: float | None = None) -> int:
        """Stop a vring; return its base. It may take as long as a request in flight."""
        answer = self.exchange(
            Request.GET_VRING_BASE, VringState(index), timeout=timeout
        )
        state: VringState = answer.payload
        if state.index != index:
            raise ProtocolError(
                f"{self.channel.peer}: GET_VRING_BASE of {index}: the reply is {state}"
            )
        return state.num

    def set_vring_kick(self, index: int, fd: AnyFd | None) -> None:
        """Starts the vring. None: the back-end polls for buffers."""
        self._vring_fd(Request.SET_VRING_KICK, index, fd)

    def set_vring_call(self, index: int, fd: AnyFd | None) -> None:
        """None: the front-end polls for used buffers."""
        self._vring_fd(Request.SET_VRING_CALL, index, fd)

    def set_vring_err(self, index: int, fd: AnyFd | None) -> None:
        """None: errors of the vring are not signalled."""
        self._vring_fd(Request.SET_VRING_ERR, index, fd)

    def _vring_fd(self, request: Request, index: int, fd: AnyFd | None) -> None:
        fds = [] if fd is None else [fd]
        self.exchange(request, VringFd(index, nofd=fd is None), fds)

    def set_vring_enable(self, index: int, enable: bool) -> None:
        self.exchange(Request.SET_VRING_ENABLE, VringState(index, int(enable)))

    def set_vring_endian(self, index: int, big: bool) -> None:
        self.exchange(Request.SET_VRING_ENDIAN, VringState(index, int(big)))

    def vring_kick(self, index: int) -> None:
        self.exchange(Request.VRING_KICK, VringState(index))

    # Migration, and recovery after a restart.

    def set_log_base(self, size: int, offset: int, fd: AnyFd) -> None:
        self.exchange(Request.SET_LOG_BASE, Log(size, offset), [fd])

    def set_log_fd(self, fd: AnyFd) -> None:
        self.exchange(Request.SET_LOG_FD, fds=[fd])

    def get_inflight_fd(self, queues: int, queue_size: int) -> tuple[Inflight, Fd]:
        asked = Inflight(0, 0, queues, queue_size)
        answer = self.exchange(Request.GET_INFLIGHT_FD, asked)
        fd = self._only_fd(Request.GET_INFLIGHT_FD, answer)
        return answer.payload, fd

    def set_inflight_fd(self, inflight: Inflight, fd: AnyFd) -> None:
        self.exchange(Request.SET_INFLIGHT_FD, inflight, [fd])

    def set_device_state_fd(
        self, direction: int, fd: AnyFd, phase: int = 0
    ) -> Fd | None:
        """Return the back-end's own fd, to be used instead; None: `fd` is used."""
        asked = DeviceState(direction, phase)
        answer = self.exchange(Request.SET_DEVICE_STATE_FD, asked, [fd])
        value: int = answer.payload.value
        if value & 0xFF:
            answer.close()
            raise PeerRefused(
                f"{self.channel.peer}: SET_DEVICE_STATE_FD refused: {value:#x}"
            )
        if value & VringFd.NOFD and not answer.fds:
            return None
        return self._only_fd(Request.SET_DEVICE_STATE_FD, answer)

    def check_device_state(self) -> None:
        """Raise `PeerRefused` if not all of the state was transferred."""
        self.exchange(Request.CHECK_DEVICE_STATE)

    def _only_fd(self, request: Request, answer: Answer) -> Fd:
        """Take the fd that the answer must have."""
        if not answer.fds:
            raise ProtocolError(f"{self.channel.peer}: {request.name}: no fd came back")
        return answer.fds.pop()
