# SPDX-License-Identifier: Apache-2.0
"""The airlock's handling of each of the front's requests.

`HANDLED` ends here: it is answered from our own state, or does something on both
sides in a way of its own. `PASSED` goes to the back as it is, for it carries no
address and no descriptor. `REFUSED` is neither, for the reason that is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import RequestRefused
from ..vhost.backend import Handler, Result
from ..vhost.fds import Fd
from ..vhost.message import Answer
from ..vhost.wire import (
    U64,
    Config,
    CryptoSession,
    DeviceState,
    Empty,
    Inflight,
    Log,
    MemoryRegion,
    MemoryTable,
    Request,
    VringAddr,
    VringFd,
    VringState,
)
from .device import Device
from .front_memory import MAX_REGIONS
from .inflight import make_record

Fds = list[Fd]
DeviceHandler = Callable[[Device, Any, Fds], Result]


def get_features(device: Device, _: Empty, fds: Fds) -> Result:
    return U64(device.offer())


def set_features(device: Device, features: U64, fds: Fds) -> None:
    device.accept(features.value)


def get_protocol_features(device: Device, _: Empty, fds: Fds) -> Result:
    return U64(device.offer_protocol())


def set_protocol_features(device: Device, features: U64, fds: Fds) -> None:
    device.accept_protocol(features.value)


def set_owner(device: Device, _: Empty, fds: Fds) -> None:
    """The back is owned when the first message goes there."""


def reset_owner(device: Device, _: Empty, fds: Fds) -> None:
    """Deprecated, and ambiguous: take it for 'disable all rings'."""
    device.rings.disable()


def set_mem_table(device: Device, table: MemoryTable, fds: Fds) -> None:
    device.set_memory(table.regions, fds)


def add_mem_reg(device: Device, region: MemoryRegion, fds: Fds) -> None:
    device.add_memory(region, fds[0])


def rem_mem_reg(device: Device, region: MemoryRegion, fds: Fds) -> None:
    device.remove_memory(region)


def get_max_mem_slots(device: Device, _: Empty, fds: Fds) -> Result:
    return U64(MAX_REGIONS)


def set_log_base(device: Device, told: Log, fds: Fds) -> None:
    device.use_log(told, fds[0])


def set_log_fd(device: Device, _: Empty, fds: Fds) -> None:
    device.use_log_fd(fds.pop())


def set_vring_num(device: Device, state: VringState, fds: Fds) -> None:
    device.rings[state.index].set_num(state.num)


def set_vring_base(device: Device, state: VringState, fds: Fds) -> None:
    device.rings[state.index].set_base(state.num)


def set_vring_addr(device: Device, addr: VringAddr, fds: Fds) -> None:
    device.rings[addr.index].set_address(addr)


def get_vring_base(device: Device, state: VringState, fds: Fds) -> Result:
    return VringState(state.index, device.rings[state.index].stop())


def set_vring_kick(device: Device, vring: VringFd, fds: Fds) -> None:
    if vring.nofd:
        raise RequestRefused(f"SET_VRING_KICK: ring {vring.index}: polling mode")
    device.rings[vring.index].set_kick(fds.pop())


def set_vring_call(device: Device, vring: VringFd, fds: Fds) -> None:
    device.rings[vring.index].set_call(fds.pop() if fds else None)


def set_vring_err(device: Device, vring: VringFd, fds: Fds) -> None:
    device.rings[vring.index].set_err(fds.pop() if fds else None)


def set_vring_enable(device: Device, state: VringState, fds: Fds) -> None:
    device.rings[state.index].enable(bool(state.num))


def set_backend_req_fd(device: Device, _: Empty, fds: Fds) -> None:
    device.front_requests.connect(fds.pop())


def reset_device(device: Device, _: Empty, fds: Fds) -> None:
    device.reset()


def get_queue_num(device: Device, _: Empty, fds: Fds) -> Result:
    return U64(device.relay.get_queue_num())


def get_config(device: Device, asked: Config, fds: Fds) -> Result:
    data = device.relay.get_config(asked)
    return Config(asked.offset, asked.size, asked.flags, data)


def set_config(device: Device, config: Config, fds: Fds) -> None:
    device.relay.set_config(config)


def send_rarp(device: Device, mac: U64, fds: Fds) -> None:
    device.relay.send_rarp(mac)


def net_set_mtu(device: Device, mtu: U64, fds: Fds) -> None:
    device.relay.set_mtu(mtu.value)


def create_crypto_session(device: Device, session: CryptoSession, fds: Fds) -> Result:
    return device.back_side.peer.create_crypto_session(session)


def close_crypto_session(device: Device, session: U64, fds: Fds) -> None:
    device.back_side.peer.close_crypto_session(session.value)


def set_status(device: Device, status: U64, fds: Fds) -> None:
    device.relay.set_status(status.value)


def get_status(device: Device, _: Empty, fds: Fds) -> Result:
    return U64(device.relay.get_status())


def get_inflight_fd(device: Device, asked: Inflight, fds: Fds) -> Result:
    made, fd = make_record(asked, (ring.vring for ring in device.rings.values()))
    return Answer(made, [fd])


def set_inflight_fd(device: Device, told: Inflight, fds: Fds) -> None:
    device.use_record(told, fds[0])


def set_device_state_fd(device: Device, state: DeviceState, fds: Fds) -> Result:
    device.transfer_state(state, fds)
    return U64(VringFd.NOFD)  # the front's own descriptor is the one to use


def check_device_state(device: Device, _: Empty, fds: Fds) -> None:
    device.check_state()


HANDLED: dict[Request, DeviceHandler] = {
    Request.GET_FEATURES: get_features,
    Request.SET_FEATURES: set_features,
    Request.SET_OWNER: set_owner,
    Request.RESET_OWNER: reset_owner,
    Request.SET_MEM_TABLE: set_mem_table,
    Request.SET_LOG_BASE: set_log_base,
    Request.SET_LOG_FD: set_log_fd,
    Request.SET_VRING_NUM: set_vring_num,
    Request.SET_VRING_ADDR: set_vring_addr,
    Request.SET_VRING_BASE: set_vring_base,
    Request.GET_VRING_BASE: get_vring_base,
    Request.SET_VRING_KICK: set_vring_kick,
    Request.SET_VRING_CALL: set_vring_call,
    Request.SET_VRING_ERR: set_vring_err,
    Request.GET_PROTOCOL_FEATURES: get_protocol_features,
    Request.SET_PROTOCOL_FEATURES: set_protocol_features,
    Request.SET_VRING_ENABLE: set_vring_enable,
    Request.SET_BACKEND_REQ_FD: set_backend_req_fd,
    Request.RESET_DEVICE: reset_device,
    Request.GET_MAX_MEM_SLOTS: get_max_mem_slots,
    Request.ADD_MEM_REG: add_mem_reg,
    Request.REM_MEM_REG: rem_mem_reg,
    Request.GET_INFLIGHT_FD: get_inflight_fd,
    Request.SET_INFLIGHT_FD: set_inflight_fd,
    Request.SET_DEVICE_STATE_FD: set_device_state_fd,
    Request.CHECK_DEVICE_STATE: check_device_state,
}

PASSED: dict[Request, DeviceHandler] = {
    Request.GET_QUEUE_NUM: get_queue_num,
    Request.SEND_RARP: send_rarp,
    Request.NET_SET_MTU: net_set_mtu,
    Request.GET_CONFIG: get_config,
    Request.SET_CONFIG: set_config,
    Request.CREATE_CRYPTO_SESSION: create_crypto_session,
    Request.CLOSE_CRYPTO_SESSION: close_crypto_session,
    Request.SET_STATUS: set_status,
    Request.GET_STATUS: get_status,
}

REFUSED: dict[Request, str] = {
    Request.NONE: "it is no request, and some back-ends exit when they get it",
    Request.IOTLB_MSG: "an IOMMU is not offered",
    Request.SET_VRING_ENDIAN: "legacy byte orders are not offered",
    Request.POSTCOPY_ADVISE: "post-copy migration is not offered",
    Request.POSTCOPY_LISTEN: "post-copy migration is not offered",
    Request.POSTCOPY_END: "post-copy migration is not offered",
    Request.GPU_SET_SOCKET: "a GPU's requests carry guest addresses",
    Request.VRING_KICK: "in-band notifications are not offered",
    Request.GET_SHARED_OBJECT: "a shared object may be guest memory",
    Request.GET_SHMEM_CONFIG: "shared memory regions bypass isolation",
}


def bind(device: Device) -> dict[Request, Handler]:
    """Return the handlers of one device's front."""

    def of(handler: DeviceHandler) -> Handler:
        def bound(payload: Any, fds: Fds) -> Result:
            with device.message():
                return device.back_side.outlive(lambda: handler(device, payload, fds))

        return bound

    def refuse(request: Request, reason: str) -> Handler:
        def handler(payload: Any, fds: Fds) -> Result:
            raise RequestRefused(f"{request.name}: {reason}")

        return handler

    handlers = {request: of(handler) for request, handler in HANDLED.items()}
    handlers |= {request: of(handler) for request, handler in PASSED.items()}
    handlers |= {request: refuse(request, why) for request, why in REFUSED.items()}
    return handlers
