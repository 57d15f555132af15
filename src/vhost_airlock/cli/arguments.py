# SPDX-License-Identifier: Apache-2.0
"""The parser of command lines, and types of arguments: text to a value, or an error."""

from __future__ import annotations

import contextlib
import grp
import os
import re
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from typing import NoReturn

from ..errors import UsageError
from ..process.sockets import Group
from ..proxy.features import Withheld

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
LONGEST_NAME = 64


class Parser(ArgumentParser):
    """A parser whose errors are one line, which names the help."""

    def error(self, message: str) -> NoReturn:
        message = message.replace("ignored explicit argument", "takes no value:")
        raise UsageError(f"{message} (see {self.prog} --help)")


def size(least: str, most: str) -> Callable[[str], int]:
    """Return a parser of a number of bytes, as 512, 64K or 1GiB, within bounds."""

    low, high = _bytes(least), _bytes(most)

    def parse(text: str) -> int:
        value = _bytes(text)
        if not low <= value <= high:
            raise ArgumentTypeError(f"{text}: no size from {least} to {most}")
        return value

    return parse


def number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a parser of a whole number within bounds; None: there is no upper one."""

    def parse(text: str) -> int:
        value = int(text) if re.fullmatch(r"\d{1,18}", text, re.ASCII) else -1
        if value < least or (most is not None and value > most):
            upto = "" if most is None else f" to {most}"
            raise ArgumentTypeError(f"{text}: no number from {least}{upto}")
        return value

    return parse


def seconds(text: str) -> float:
    """Return a positive number of seconds up to an hour."""
    value = _float(text)
    if not 0 < value <= 3600:
        raise ArgumentTypeError(f"{text}: no number of seconds up to 3600")
    return value


def interval(text: str) -> float:
    """Return a number of seconds from a hundredth to a day."""
    value = _float(text)
    if not 0.01 <= value <= 86400:
        raise ArgumentTypeError(f"{text}: no number of seconds up to a day")
    return value


def cpus(text: str) -> tuple[int, ...]:
    """Return the numbers of a list of processors, as 2,4-6, in their order."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ArgumentTypeError(f"{text}: no list of processors, as 2,4-6")
        found += range(first, last + 1)
    if surplus := set(found) - os.sched_getaffinity(0):
        raise ArgumentTypeError(f"{text}: may not run on processor {min(surplus)}")
    return tuple(found)


def name(text: str) -> str:
    """Return a name for a device: a few printable characters, since lines of the log
    begin with it.
    """
    if not text or len(text) > LONGEST_NAME or not text.isprintable():
        raise ArgumentTypeError(
            f"{text!a}: no name of 1 to {LONGEST_NAME} printable characters"
        )
    return text


def mode(text: str) -> int:
    """Return the mode of a file, from octal digits."""
    if not re.fullmatch(r"0?[0-7]{3}", text, re.ASCII):
        raise ArgumentTypeError(f"{text}: no mode in octal digits, as 0660")
    return int(text, 8)


def group(text: str) -> Group:
    """Return the group with this name or number."""
    with contextlib.suppress(KeyError):
        return Group(text, grp.getgrnam(text).gr_gid)
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise ArgumentTypeError(f"{text}: there is no such group")
    return Group(text, int(text))


def features(text: str) -> Withheld:
    """Return the features of a list of names and masks, as EVENT_IDX,0x4000."""
    try:
        return Withheld.parse(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def switch(text: str) -> bool:
    """Return True for "on", False for "off"."""
    if text not in ("on", "off"):
        raise ArgumentTypeError(f"{text}: neither on nor off")
    return text == "on"


def _bytes(text: str) -> int:
    """Return a number of bytes; -1: the text is no size."""
    match = re.fullmatch(r"(\d{1,18})([KMGT]?)i?B?", text, re.IGNORECASE)
    return int(match[1]) * UNITS[match[2].upper()] if match else -1


def _float(text: str) -> float:
    with contextlib.suppress(ValueError):
        return float(text)
    return 0.0
