"""Types of the command lines' arguments: text to a value within bounds, or why not."""

from __future__ import annotations

import contextlib
import re
from argparse import ArgumentTypeError
from collections.abc import Callable

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size(least: str, most: str) -> Callable[[str], int]:
    """A number of bytes, as 512, 64K or 1GiB."""

    def parse(text: str) -> int:
        value = _bytes(text)
        if value is None or not bounds[0] <= value <= bounds[1]:
            raise ArgumentTypeError(f"{text}: no size from {least} to {most}")
        return value

    bounds = _bytes(least) or 0, _bytes(most) or 0
    return parse


def number(least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number."""

    def parse(text: str) -> int:
        value = int(text) if re.fullmatch(r"\d{1,18}", text, re.ASCII) else -1
        if value < least or (most is not None and value > most):
            upto = "" if most is None else f" to {most}"
            raise ArgumentTypeError(f"{text}: no number from {least}{upto}")
        return value

    return parse


def seconds(text: str) -> float:
    """A positive number of seconds up to an hour."""
    value = 0.0
    with contextlib.suppress(ValueError):
        value = float(text)
    if not 0 < value <= 3600:
        raise ArgumentTypeError(f"{text}: no number of seconds up to 3600")
    return value


def switch(text: str) -> bool:
    """Whether it is on."""
    if text not in ("on", "off"):
        raise ArgumentTypeError(f"{text}: neither on nor off")
    return text == "on"


def _bytes(text: str) -> int | None:
    match = re.fullmatch(r"(\d{1,18})([KMGT]?)i?B?", text, re.IGNORECASE)
    return int(match[1]) * UNITS[match[2].upper()] if match else None
