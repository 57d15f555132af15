# SPDX-License-Identifier: Apache-2.0
"""The fuzzer's bytes, taken as choices. When they are used up, all choices are 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

_T = TypeVar("_T")


class Source:
    """Each choice takes few bytes of its own: one changed byte is one change."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def more(self) -> bool:
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        """Return this number of bytes, zeros behind the last one of the input."""
        data = self._data[self._at : self._at + size]
        self._at += size
        return data.ljust(size, b"\0")

    def rest(self) -> bytes:
        data = self._data[self._at :]
        self._at = len(self._data)
        return data

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def below(self, limit: int) -> int:
        return self.number(1 if limit <= 0x100 else 2) % limit

    def flag(self) -> bool:
        return bool(self.number(1) & 1)

    def choice(self, options: Sequence[_T]) -> _T:
        return options[self.below(len(options))]
