# SPDX-License-Identifier: Apache-2.0
"""Which vhost-user devices of a QEMU command get an airlock, and the command with them.

A device names its back-end by a chardev:

    -device vhost-user-blk-pci,chardev=disk       -chardev socket,id=disk,path=a.sock

The airlock gets a.sock, and the chardev the path of the airlock's socket instead; in
the same way it gets the inherited socket of a chardev with fd=, which QEMU loses. A
network card, a cryptodev name theirs by way of -netdev or -object. All devices get an
airlock; but where devices say memory-isolation=on, those alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import StartError, UsageError
from ..proxy.device_types import TYPES
from .qemu_options import Option, is_on, options, texts

PROPERTY = "memory-isolation"
"""The property that QEMU's own memory isolation is to get. QEMU does not see it yet."""

LINKS = ("netdev", "cryptodev")
"""Parameters by which a device names the -netdev or -object with its back-end."""

DRIVERS = {"blk": "block", "snd": "sound", "vga": "gpu", "cryptodev": "crypto"}
"""Types of device that are called otherwise in the names of QEMU's drivers."""

GENERIC = ("", "device", "test", "test-device")
"""Drivers for any type of device, whose number is in the parameter virtio-id."""

MEMORY = {"machine": "memory-backend", "M": "memory-backend", "numa": "memdev"}
"""Options that name the -object with the guest's memory, and the parameter."""

SHARE = {
    "memory-backend-file": "off",
    "memory-backend-ram": "off",
    "memory-backend-memfd": "on",
}
"""Objects for memory that have a parameter `share`, and QEMU's default for it."""


@dataclass(frozen=True)
class Device:
    """A device with a vhost-user back-end."""

    option: Option
    """The option that names the chardev."""
    chardev: str
    label: str
    """The option as messages name it."""


@dataclass(frozen=True)
class Isolated:
    """A device that gets an airlock."""

    name: str
    """The chardev's."""
    back: str
    """The path of the back-end's socket, on which it listens or QEMU listens; "": it is
    an inherited one."""
    listens: bool
    """QEMU listens, and the back-end connects."""
    may_come: bool
    """QEMU connects again and again, so the back-end need not be there yet."""
    kind: str
    """A name or number of --device-type; "": not known."""
    fd: int | None = None
    """The number of the back-end's socket, which is connected or listens."""

    @property
    def file(self) -> str:
        """The file name of the airlock's socket."""
        return re.sub(r"[^\w.-]", "_", self.name).lstrip(".") + ".sock"


class Plan:
    """A QEMU command, and the airlocks that it gets.

    StartError: it wants isolation that is not possible. UsageError: the command can't
    be understood.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.warnings: list[str] = []
        self._options = list(options(words))
        self._chardevs = {
            option.parameters.get("id"): option
            for option in self._options
            if option.name == "chardev"
        }
        devices = {device.chardev: device for device in self._devices()}
        wishes = self._wishes([*devices.values()])
        must = True in wishes.values()
        chosen = [
            device for name, device in devices.items() if wishes.get(name, not must)
        ]
        self.isolated = [*filter(None, (self._isolate(each, must) for each in chosen))]
        self._check_rest()

    def command(self, folder: str) -> list[str]:
        """Return the command with the airlocks' sockets, which are in this folder."""
        for device in self.isolated:
            chardev = self._chardevs[device.name]
            chardev.parameters.take("fd")
            chardev.parameters.set("path", os.path.join(folder, device.file))
            self.words[chardev.place] = str(chardev.parameters)
        return self.words

    def _devices(self) -> Iterator[Device]:
        for option in self._options:
            get = option.parameters.get
            driver = get("driver") or get("type") or get("qom-type") or ""
            chardev = get("chardev")
            if "vhost-user" in driver and chardev is not None:
                yield Device(option, chardev, f"-{option.name} {driver}")

    def _wishes(self, devices: list[Device]) -> dict[str, bool]:
        """Take the property out of all options; returns its values by the names of
        chardevs.
        """
        linked = {each.option.parameters.get("id"): each.chardev for each in devices}
        wishes = {}
        for option in self._options:
            value = option.parameters.take(PROPERTY)
            if value is None:
                continue
            get = option.parameters.get
            self.words[option.place] = str(option.parameters)
            wish = is_on(option.name, PROPERTY, value)
            found = {each.chardev for each in devices if each.option is option}
            links = {get(link) for link in LINKS} - {None}
            found |= {linked[link] for link in links if link in linked}
            if wish and not found:
                raise StartError(
                    f"-{option.name} {option.parameters}: {PROPERTY}=on, but it has no"
                    " vhost-user back-end"
                )
            wishes.update(dict.fromkeys(found, wish))
        return wishes

    def _isolate(self, device: Device, must: bool) -> Isolated | None:
        """Return the device's airlock. None: it gets none, and there is a warning."""
        name, kind = device.chardev, device_type(device)
        trouble = refusal(kind) or self._unfit(name)
        if trouble and must:
            raise StartError(f"{device.label}: {PROPERTY}=on, but {trouble}")
        if trouble:
            self.warnings.append(f"{device.label} is NOT isolated: {trouble}")
            return None
        get = self._chardevs[name].parameters.get
        return Isolated(
            name=name,
            back=get("path") or "",
            listens=is_on("chardev", "server", get("server") or "off"),
            may_come=(get("reconnect-ms") or get("reconnect") or "0") != "0",
            kind=kind,
            fd=_number(get("fd")),
        )

    def _unfit(self, name: str) -> str:
        """Return why an airlock can't take a chardev's place; "": it can."""
        chardev = self._chardevs.get(name)
        if chardev is None:
            return f"there is no -chardev with id={name}"
        get = chardev.parameters.get
        if get("backend") != "socket":
            return f"-chardev {name} is no socket"
        if (fd := get("fd")) is not None:
            wrong = f"-chardev {name} has fd={fd}, which is no number"
            return wrong if _number(fd) is None else ""
        if get("path") is None:
            return f"-chardev {name} has no path"
        if is_on("chardev", "abstract", get("abstract") or "off"):
            return f"-chardev {name} is an abstract socket"
        return ""

    def _check_rest(self) -> None:
        """Look at what could change the options that were read."""
        for name in ("global", "set"):
            for text in texts(self.words, name):
                if PROPERTY in text:
                    raise UsageError(f"-{name} {text}: put {PROPERTY} in -device")
        for text in texts(self.words, "set"):
            for device in self.isolated:
                if text.startswith(f"chardev.{device.name}."):
                    raise UsageError(f"-set {text}: put it in -chardev")
        files = texts(self.words, "readconfig")
        self.warnings += [f"devices in {file} are NOT isolated" for file in files]
        if self.isolated and not files:
            self.warnings += unshared(self._options)


def _number(text: str | None) -> int | None:
    """Return the number of a descriptor; None if it is none."""
    is_one = text is not None and re.fullmatch(r"\d{1,9}", text, re.ASCII)
    return int(text) if text is not None and is_one else None


def device_type(device: Device) -> str:
    """Return the type of a device as --device-type wants it; "": it is not known."""
    get = device.option.parameters.get
    if device.option.name in ("netdev", "nic"):
        return "net"
    name = get("driver") or get("qom-type") or ""
    base = re.sub(r"(-pci|-ccw|-device)?(-(non-)?transitional)?$", "", name)
    base = re.sub(r"-?vhost-user-?", "", base)
    wanted = get("virtio-id") if base in GENERIC else DRIVERS.get(base, base)
    known = {text for kind in TYPES for text in (kind.name, str(kind.number))}
    return wanted if wanted in known else ""


def refusal(kind: str) -> str:
    """Return why a type of device can't be isolated; "": it can."""
    for each in TYPES:
        if each.refused and kind in (each.name, str(each.number)):
            return f"a {each.name} device can't be: {each.refused}"
    return ""


def unshared(found: Sequence[Option]) -> Iterator[str]:
    """Return warnings of guest memory that QEMU can't share, by its options."""
    used = {option.parameters.get(MEMORY.get(option.name, "")) for option in found}
    if used == {None}:
        yield (
            "the guest's memory is not shared: neither -machine has a memory-backend"
            " nor -numa a memdev"
        )
    for option in found:
        get = option.parameters.get
        kind = get("qom-type") or ""
        share = get("share") or SHARE.get(kind, "on")
        if get("id") in used and not is_on("object", "share", share):
            yield (
                f"the guest's memory is not shared: -object {kind},id={get('id')}"
                " has no share=on"
            )
