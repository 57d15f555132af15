# SPDX-License-Identifier: Apache-2.0
"""`run --print-capabilities`: the device's type and features, for management layers.

The form is that of QEMU's vhost-user.json. A back-end that the airlock starts tells its
own.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self

from ..errors import StartError, UsageError
from ..process.program import why_not_started
from ..proxy.device_types import TYPES, DeviceType

PATIENCE = 5.0
"""Seconds that the back-end's program has to tell its capabilities."""


@dataclass(frozen=True)
class Capabilities:
    """The type of a device, by its name in vhost-user.json, and its features."""

    type: str
    features: tuple[str, ...] = ()

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Return what a back-end's program has printed. ValueError: it has no type."""
        told = json.loads(text)
        found = told if isinstance(told, dict) else {}
        kind, features = found.get("type"), found.get("features", [])
        if not isinstance(kind, str) or not isinstance(features, list):
            raise ValueError
        return cls(kind, tuple(map(str, features)))


def capabilities(kind: DeviceType | None, command: Sequence[str]) -> Capabilities:
    """Return the capabilities of a device of this type, or with this command.

    StartError: the device can't be isolated, or the program does not tell its type.
    """
    if command:
        found = _ask(command[0], kind)
    elif kind is not None:
        found = Capabilities(kind.name)
    else:
        raise UsageError("--print-capabilities needs --device-type TYPE or -- COMMAND")
    for each in TYPES:
        if each.name == found.type:
            each.require_isolation()
    return found


def _ask(program: str, kind: DeviceType | None) -> Capabilities:
    """Return what a program tells; of this type, if the program can't tell."""
    command = [program, "--print-capabilities"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE
        )
        found = Capabilities.parse(done.stdout)
    except OSError as error:
        reason = why_not_started(program, error)
        raise StartError(f"can't start {program}: {reason}") from None
    except (ValueError, subprocess.TimeoutExpired):
        if kind is None:
            raise StartError(
                f"{' '.join(command)} prints no type: give --device-type"
            ) from None
        return Capabilities(kind.name)
    if kind is not None and kind.name != found.type:
        raise StartError(
            f"--device-type {kind.name}: {program} is a back-end of type {found.type}"
        )
    return found
