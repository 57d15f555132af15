# SPDX-License-Identifier: Apache-2.0
"""The vhost-user devices of test guests, as QEMU's arguments and the guest's needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Device:
    """A device, the modules that drive it, and the tools to use it."""

    arguments: tuple[str, ...]
    modules: tuple[str, ...]
    tools: tuple[str, ...] = ()


FIO = Device((), (), ("/usr/bin/fio",))
"""No device, but fio. A guest that has it takes 384 MiB of memory."""


def disk(front: Path, *, reconnect: bool = False, **properties: Any) -> Device:
    """With `reconnect`, QEMU connects again when its back-end is gone."""
    device = _device("vhost-user-blk-pci", "chardev=disk", properties)
    return Device(
        (*_chardev("disk", front, ",reconnect-ms=50" if reconnect else ""), *device),
        ("virtio_blk", "ext4"),
        ("/sbin/mke2fs", "/sbin/e2fsck", "/sbin/sfdisk"),
    )


def file_system(front: Path, tag: str, **properties: Any) -> Device:
    device = _device("vhost-user-fs-pci", f"chardev={tag},tag={tag}", properties)
    return Device((*_chardev(tag, front), *device), ("virtiofs",))


def net(front: Path, pairs: int = 1, **properties: Any) -> Device:
    """A network interface with so many pairs of queues."""
    netdev = ("-netdev", f"vhost-user,id=net,chardev=front-net,queues={pairs}")
    if pairs > 1:
        properties |= {"mq": "on", "vectors": 2 * pairs + 2}
    device = _device("virtio-net-pci", "netdev=net,romfile=", properties)
    return Device((*_chardev("front-net", front), *netdev, *device), ("virtio_net",))


def vsock(front: Path, **properties: Any) -> Device:
    device = _device("vhost-user-vsock-pci", "chardev=vsock", properties)
    modules = ("vmw_vsock_virtio_transport",)
    return Device((*_chardev("vsock", front), *device), modules)


def _chardev(name: str, front: Path, more: str = "") -> tuple[str, str]:
    return "-chardev", f"socket,id={name},path={front}{more}"


def _device(name: str, wiring: str, properties: dict[str, Any]) -> tuple[str, str]:
    """Properties have '_' for '-'."""
    words = [f"{key.replace('_', '-')}={value}" for key, value in properties.items()]
    return "-device", ",".join([name, wiring, *words])
