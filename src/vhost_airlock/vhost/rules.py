# SPDX-License-Identifier: Apache-2.0
"""The rule for each request: its payload, its descriptors, and its reply or ack.

`RULES` is for the front-end's requests, `BACKEND_RULES` for the back-end's own, on
their socket. The receiver of a message checks it against its rule before any other code
looks at it:

- `check()` finds out whether a request has the form that it must have: size, number of
  descriptors, and lengths that fit together. If not, its sender is not to be relied on.
- `examine()` finds out whether the values of a request make sense: none is empty or out
  of range. If not, this one request is refused.
- `check_reply()` is for replies.

Two forms that the specification allows are not supported:

- SET_LOG_BASE without LOG_SHMFD, a bare address: there is no way to share that memory.
- SET_MEM_TABLE and ADD_MEM_REG in post-copy have a reply of their own; PAGEFAULT is not
  a feature that this library negotiates, so they are plain requests here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Any

from ..errors import ProtocolError, RequestRefused
from ..record import record
from .wire import (
    MAX_PAYLOAD,
    MAX_VRING_SIZE,
    MAX_VRINGS,
    U64,
    BackendRequest,
    Config,
    CryptoSession,
    DeviceState,
    Empty,
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
    ShmemMap,
    VringAddr,
    VringArea,
    VringFd,
    VringState,
)


class Ack(Enum):
    """The kind of reply or ack to a request."""

    ASKED = auto()
    """A number, 0 for success, if the sender set need_reply and has REPLY_ACK."""
    ALWAYS = auto()
    """A number, 0 for success."""
    ECHO = auto()
    """The request's payload. Programs differ on this, so receivers don't look at it."""
    REPLY = auto()
    """A payload of its own."""


NO_FDS = range(1)
MAYBE_FD = range(2)
ONE_FD = range(1, 2)

MIN_MTU, MAX_MTU = 68, 65535
"""The bounds of a network device's MTU, in the virtio specification."""

SUCCESS = U64(0)
FAILURE = U64(1)
_NOTHING = ProtocolFeature(0)


def _any_form(payload: Any, fds: int) -> bool:
    return True


def _any_value(payload: Any) -> str:
    return ""


@record
class Rule:
    """The parts of one request, and of its reply or ack."""

    payload: type[Payload] = Empty
    reply: type[Payload] = U64
    """The payload of the ack, or of the reply of its own."""
    ack: Ack = Ack.ASKED
    fds: range | None = NO_FDS
    """The numbers of descriptors that may come; None: `valid` says it."""
    reply_fds: range = NO_FDS
    refusal: Payload | None = FAILURE
    """The ack or reply that says no; None: there is none."""
    needs: ProtocolFeature = _NOTHING
    """Without this feature, the request is refused."""
    valid: Callable[[Any, int], bool] = _any_form
    """Is a payload, with this number of fds, possible at all?"""
    wrong: Callable[[Any], str] = _any_value
    """Return a text that names a wrong field of a payload and its value; "": none is.
    """

    @property
    def answered(self) -> bool:
        """Is a reply or ack due even if the sender did not ask for one?"""
        return self.ack is not Ack.ASKED

    def refuses(self, reply: Payload, fds: int) -> bool:
        """Does this reply, with this number of fds, say no?"""
        if isinstance(reply, U64) and self.ack in (Ack.ASKED, Ack.ALWAYS):
            return reply.value != 0
        return reply == self.refusal and not fds


def _reply(
    reply: type[Payload],
    payload: type[Payload] = Empty,
    *,
    refusal: Payload | None = None,
    **more: Any,
) -> Rule:
    """A rule for a request with a reply of its own."""
    return Rule(payload, reply, Ack.REPLY, refusal=refusal, **more)


# Forms.


def _vring_fd(payload: VringFd, fds: int) -> bool:
    return fds == (0 if payload.nofd else 1)


def _fd_a_region(payload: MemoryTable, fds: int) -> bool:
    return fds == len(payload.regions)


def _question(payload: Config, fds: int) -> bool:
    return len(payload.data) in (0, payload.size)


def _data(payload: Config, fds: int) -> bool:
    return len(payload.data) == payload.size


# Values.


def _outside(field: str, value: int, low: int, high: int) -> str:
    """Return "", or if a number is not from `low` to `high`, a text that says so."""
    if low <= value <= high:
        return ""
    return f"{field} is {value}, not {low} to {high}"


def _vring(payload: VringState | VringAddr) -> str:
    return _outside("index", payload.index, 0, MAX_VRINGS - 1)


def _switch(payload: VringState) -> str:
    return _vring(payload) or _outside("num", payload.num, 0, 1)


def _status(payload: U64) -> str:
    return _outside("status", payload.value, 0, 0xFF)


def _mac(payload: U64) -> str:
    mac = payload.pack()
    return f"MAC {mac.hex(':')} has more than 6 bytes" if any(mac[6:]) else ""


def _mtu(payload: U64) -> str:
    return _outside("MTU", payload.value, MIN_MTU, MAX_MTU)


def _config(payload: Config) -> str:
    return (
        _outside("size", payload.size, 1, Config.MAX_DATA)
        or _outside("offset", payload.offset, 0, MAX_PAYLOAD - payload.size)
        or _outside("flags", payload.flags, 0, 1)
    )


def _crypto_session(payload: U64) -> str:
    return _outside("session id", payload.value, 0, (1 << 63) - 1)


def _inflight(payload: Inflight) -> str:
    return _outside("num_queues", payload.num_queues, 1, MAX_VRINGS) or _outside(
        "queue_size", payload.queue_size, 1, MAX_VRING_SIZE
    )


def _transfer(payload: DeviceState) -> str:
    return _outside("direction", payload.direction, 0, 1) or _outside(
        "phase", payload.phase, 0, 0
    )


_F = ProtocolFeature

RULES: dict[Request, Rule] = {
    Request.NONE: Rule(),
    Request.GET_FEATURES: _reply(U64),
    Request.SET_FEATURES: Rule(U64),
    Request.SET_OWNER: Rule(),
    Request.RESET_OWNER: Rule(),
    Request.SET_MEM_TABLE: Rule(MemoryTable, fds=None, valid=_fd_a_region),
    Request.SET_LOG_BASE: Rule(
        Log, Log, Ack.ECHO, fds=ONE_FD, refusal=None, needs=_F.LOG_SHMFD
    ),
    Request.SET_LOG_FD: Rule(fds=ONE_FD),
    Request.SET_VRING_NUM: Rule(VringState, wrong=_vring),
    Request.SET_VRING_ADDR: Rule(VringAddr, wrong=_vring),
    Request.SET_VRING_BASE: Rule(VringState, wrong=_vring),
    Request.GET_VRING_BASE: _reply(VringState, VringState, wrong=_vring),
    Request.SET_VRING_KICK: Rule(VringFd, fds=None, valid=_vring_fd),
    Request.SET_VRING_CALL: Rule(VringFd, fds=None, valid=_vring_fd),
    Request.SET_VRING_ERR: Rule(VringFd, fds=None, valid=_vring_fd),
    Request.GET_PROTOCOL_FEATURES: _reply(U64),
    Request.SET_PROTOCOL_FEATURES: Rule(U64),
    Request.GET_QUEUE_NUM: _reply(U64, needs=_F.MQ),
    Request.SET_VRING_ENABLE: Rule(VringState, wrong=_switch),
    Request.SEND_RARP: Rule(U64, needs=_F.RARP, wrong=_mac),
    Request.NET_SET_MTU: Rule(U64, needs=_F.NET_MTU, wrong=_mtu),
    Request.SET_BACKEND_REQ_FD: Rule(fds=ONE_FD, needs=_F.BACKEND_REQ),
    Request.IOTLB_MSG: Rule(Iotlb, U64, Ack.ALWAYS),
    Request.SET_VRING_ENDIAN: Rule(VringState, needs=_F.CROSS_ENDIAN, wrong=_switch),
    Request.GET_CONFIG: _reply(
        Config,
        Config,
        refusal=Empty(),
        needs=_F.CONFIG,
        valid=_question,
        wrong=_config,
    ),
    Request.SET_CONFIG: Rule(Config, needs=_F.CONFIG, valid=_data, wrong=_config),
    Request.CREATE_CRYPTO_SESSION: _reply(
        CryptoSession, CryptoSession, needs=_F.CRYPTO_SESSION
    ),
    Request.CLOSE_CRYPTO_SESSION: Rule(
        U64, needs=_F.CRYPTO_SESSION, wrong=_crypto_session
    ),
    Request.POSTCOPY_ADVISE: _reply(Empty, reply_fds=ONE_FD, needs=_F.PAGEFAULT),
    Request.POSTCOPY_LISTEN: Rule(needs=_F.PAGEFAULT),
    Request.POSTCOPY_END: Rule(Empty, U64, Ack.ALWAYS, needs=_F.PAGEFAULT),
    Request.GET_INFLIGHT_FD: _reply(
        Inflight,
        Inflight,
        reply_fds=MAYBE_FD,
        refusal=Inflight(0, 0, 0, 0),
        needs=_F.INFLIGHT_SHMFD,
        wrong=_inflight,
    ),
    Request.SET_INFLIGHT_FD: Rule(
        Inflight, fds=ONE_FD, needs=_F.INFLIGHT_SHMFD, wrong=_inflight
    ),
    Request.GPU_SET_SOCKET: Rule(fds=ONE_FD),
    Request.RESET_DEVICE: Rule(needs=_F.RESET_DEVICE),
    Request.VRING_KICK: Rule(VringState, needs=_F.INBAND_NOTIFICATIONS, wrong=_vring),
    Request.GET_MAX_MEM_SLOTS: _reply(U64, needs=_F.CONFIGURE_MEM_SLOTS),
    Request.ADD_MEM_REG: Rule(MemoryRegion, fds=ONE_FD, needs=_F.CONFIGURE_MEM_SLOTS),
    # Some front-ends send an fd with it, which has no use.
    Request.REM_MEM_REG: Rule(MemoryRegion, fds=MAYBE_FD, needs=_F.CONFIGURE_MEM_SLOTS),
    Request.SET_STATUS: Rule(U64, needs=_F.STATUS, wrong=_status),
    Request.GET_STATUS: _reply(U64, needs=_F.STATUS),
    Request.GET_SHARED_OBJECT: _reply(
        SharedObject,
        SharedObject,
        reply_fds=MAYBE_FD,
        refusal=SharedObject(),
        needs=_F.SHARED_OBJECT,
    ),
    # Bits 0 to 7 are an error, bit 8 says that no fd comes back.
    Request.SET_DEVICE_STATE_FD: _reply(
        U64,
        DeviceState,
        fds=ONE_FD,
        reply_fds=MAYBE_FD,
        refusal=U64(0x101),
        needs=_F.DEVICE_STATE,
        wrong=_transfer,
    ),
    Request.CHECK_DEVICE_STATE: Rule(Empty, U64, Ack.ALWAYS, needs=_F.DEVICE_STATE),
    Request.GET_SHMEM_CONFIG: _reply(ShmemConfig, needs=_F.SHMEM_MAP),
}

BACKEND_RULES: dict[BackendRequest, Rule] = {
    BackendRequest.IOTLB_MSG: Rule(Iotlb),
    BackendRequest.CONFIG_CHANGE_MSG: Rule(needs=_F.CONFIG),
    BackendRequest.VRING_HOST_NOTIFIER_MSG: Rule(
        VringArea, fds=MAYBE_FD, needs=_F.HOST_NOTIFIER
    ),
    BackendRequest.VRING_CALL: Rule(
        VringState, needs=_F.INBAND_NOTIFICATIONS, wrong=_vring
    ),
    BackendRequest.VRING_ERR: Rule(
        VringState, needs=_F.INBAND_NOTIFICATIONS, wrong=_vring
    ),
    BackendRequest.SHARED_OBJECT_ADD: Rule(SharedObject, needs=_F.SHARED_OBJECT),
    BackendRequest.SHARED_OBJECT_REMOVE: Rule(SharedObject, needs=_F.SHARED_OBJECT),
    BackendRequest.SHARED_OBJECT_LOOKUP: _reply(
        U64,
        SharedObject,
        reply_fds=MAYBE_FD,
        refusal=FAILURE,
        needs=_F.SHARED_OBJECT,
    ),
    BackendRequest.SHMEM_MAP: Rule(ShmemMap, fds=ONE_FD, needs=_F.SHMEM_MAP),
    BackendRequest.SHMEM_UNMAP: Rule(ShmemMap, needs=_F.SHMEM_MAP),
}

AnyRequest = Request | BackendRequest
AnyRules = Mapping[Any, Rule]
"""RULES or BACKEND_RULES."""


def payload_limit(rules: AnyRules) -> Callable[[int], int]:
    """Return a function from a request's number to its largest payload's size."""

    def limit(request: int) -> int:
        rule = rules.get(request)
        return MAX_PAYLOAD if rule is None else rule.payload.MAX_SIZE

    return limit


def permit(request: AnyRequest, rule: Rule, features: ProtocolFeature) -> None:
    """Raise `RequestRefused` if a request needs a feature that is missing here."""
    if missing := rule.needs & ~features:
        raise RequestRefused(f"{request.name} needs protocol feature {missing.name}")


def check(request: AnyRequest, rule: Rule, data: bytes, fds: int) -> Any:
    """Return the payload of a request. ProtocolError if its form is wrong."""
    payload = _unpack(request, rule.payload, data)
    if rule.fds is not None and fds not in rule.fds:
        raise ProtocolError(f"{request.name}: {fds} fds, not {_count(rule.fds)}")
    if not rule.valid(payload, fds):
        raise ProtocolError(f"{request.name}: impossible with {fds} fds: {payload}")
    return payload


def examine(request: AnyRequest, rule: Rule, payload: Any) -> None:
    """Raise `RequestRefused` if the values of a request make no sense."""
    if reason := rule.wrong(payload):
        raise RequestRefused(f"{request.name}: {reason}")


def check_reply(request: AnyRequest, rule: Rule, data: bytes, fds: int) -> Any:
    """Return the payload of a reply, which may be the rule's refusal. ProtocolError if
    its form is wrong.
    """
    if fds not in rule.reply_fds:
        raise ProtocolError(
            f"reply to {request.name}: {fds} fds, not {_count(rule.reply_fds)}"
        )
    if rule.ack is Ack.ECHO:
        return Empty()
    if rule.refusal is not None and data == rule.refusal.pack():
        return rule.refusal
    return _unpack(request, rule.reply, data, "reply to ")


def _unpack(
    request: AnyRequest, kind: type[Payload], data: bytes, what: str = ""
) -> Payload:
    try:
        return kind.unpack(data)
    except ProtocolError as error:
        raise ProtocolError(f"{what}{request.name}: {error}") from None


def _count(fds: range) -> str:
    return " or ".join(map(str, fds))
