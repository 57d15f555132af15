# SPDX-License-Identifier: Apache-2.0
"""The syntax of QEMU's command line: options with parameters, read and written anew.

The parameters of an option are one word, in one of two forms:

    -chardev socket,id=disk,path=/run/a,,b.sock,server=on      (,, stands for a comma)
    -device '{"driver": "vhost-user-blk-pci", "chardev": "disk"}'
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..errors import UsageError

IMPLIED = {
    "chardev": "backend",
    "device": "driver",
    "netdev": "type",
    "nic": "type",
    "object": "qom-type",
    "machine": "type",
    "M": "type",
    "numa": "type",
}
"""The options with parameters that are read, and the name of the first parameter where
the command line leaves it out."""


class Parameters:
    """The parameters of one option, in their order. str() is the word for QEMU."""

    def __init__(self, option: str, text: str) -> None:
        self._json: dict[str, Any] | None = None
        self._parts: list[tuple[str, str | None]] = []
        if text.startswith("{"):
            self._json = _json_object(option, text)
        else:
            self._parts = _parts(IMPLIED[option], text)

    def get(self, name: str) -> str | None:
        """Return a parameter's value, the last one that is given; None: there is none.

        A switch is "on" or "off", also where it is written as true, or as `server` or
        `nowait` without a value.
        """
        if self._json is not None:
            value = self._json.get(name)
            if isinstance(value, bool):
                return "on" if value else "off"
            return None if value is None else str(value)
        for key, text in reversed(self._parts):
            if key == name:
                return "on" if text is None else text
            if key == f"no{name}" and text is None:
                return "off"
        return None

    def set(self, name: str, value: str) -> None:
        """Give a parameter another value, or add it."""
        if self._json is not None:
            self._json[name] = value
        elif self.get(name) is None:
            self._parts.append((name, value))
        else:
            self._parts = [
                (key, value if key == name else text) for key, text in self._parts
            ]

    def take(self, name: str) -> str | None:
        """Remove a parameter; returns the value that it had, None if there was none."""
        value = self.get(name)
        if self._json is not None:
            self._json.pop(name, None)
        else:
            gone = (name, f"no{name}")
            self._parts = [part for part in self._parts if part[0] not in gone]
        return value

    def __str__(self) -> str:
        if self._json is not None:
            return json.dumps(self._json)
        return ",".join(_word(*part) for part in self._parts)


@dataclass(frozen=True)
class Option:
    """An option with parameters, and the place of its parameters in the command."""

    name: str
    place: int
    parameters: Parameters


def options(words: Sequence[str]) -> Iterator[Option]:
    """Find the options of IMPLIED in a command. UsageError: one can't be read."""
    places = iter(range(1, len(words)))
    for place in places:
        name = _name(words[place - 1])
        if name in IMPLIED:
            yield Option(name, place, Parameters(name, words[place]))
            next(places, None)  # the parameters are no option themselves


def texts(words: Sequence[str], option: str) -> list[str]:
    """Return the words that follow an option, wherever it stands in a command."""
    return [text for word, text in pairwise(words) if _name(word) == option]


def has(words: Sequence[str], option: str) -> bool:
    """Is this option in a command?"""
    return any(_name(word) == option for word in words)


def _name(word: str) -> str:
    """Return an option's name without its dashes; "" if the word is no option."""
    match = re.fullmatch(r"--?(\w[\w-]*)", word)
    return "" if match is None else match[1]


def is_on(option: str, name: str, value: str) -> bool:
    """Return a switch's value; UsageError if it is neither on nor off."""
    if value in ("on", "yes", "true", "y"):
        return True
    if value in ("off", "no", "false", "n"):
        return False
    raise UsageError(f"-{option}: {name}={value} is neither on nor off")


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise UsageError(f"-{option} {text}: can't be read as JSON: {error}") from None
    return found


def _parts(implied: str, text: str) -> list[tuple[str, str | None]]:
    """Return (name, value) of each parameter; None as the value: there is only a name.

    A doubled comma belongs to a value, a single one ends it.
    """
    found: list[tuple[str, str | None]] = []
    for part in re.findall(r"((?:[^,]|,,)+)(?:,|$)", text):
        name, equals, value = part.partition("=")
        if equals:
            found.append((name, value.replace(",,", ",")))
        elif not found:
            found.append((implied, name.replace(",,", ",")))
        else:
            found.append((name, None))
    return found


def _word(name: str, value: str | None) -> str:
    if value is None:
        return name
    return f"{name}={value.replace(',', ',,')}"
