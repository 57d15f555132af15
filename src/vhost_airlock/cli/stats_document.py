# SPDX-License-Identifier: Apache-2.0
"""The state of running airlocks, as they tell it at their sockets for stats."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

from ..errors import StartError
from ..process.sockets import reason_of
from ..process.stats_server import KIND

PATIENCE = 5.0
"""Seconds that the airlock has to answer."""
LARGEST = 16 << 20
"""The most bytes of an answer: an airlock's is shorter."""
AT_ONCE = 16
"""Airlocks that are asked at the same time."""


@dataclass(frozen=True)
class Document:
    """The state of an airlock at one moment, by its own account."""

    name: str
    version: str
    uptime: float
    sessions: int
    vmm_connected: bool
    vmm_waits: bool
    """A VMM is connected, and not served yet: for want of the back-end, or since
    another VMM is served."""
    backend_connected: bool
    rings: dict[str, dict[str, str | None]]
    counters: dict[str, dict[str, int]]
    pid: int = 0
    """The airlock's process; 0: it is too old to tell it."""

    @classmethod
    def of(cls, data: Any) -> Self:
        """Take the known fields. ValueError, KeyError, TypeError: one is missing or of
        a wrong type.
        """
        given = {"pid": 0} | data
        document = cls(**{name: given[name] for name in cls.__dataclass_fields__})
        for group in (document.rings, document.counters):
            if not all(isinstance(each, dict) for each in group.values()):
                raise ValueError("rings and counters are no objects")
        for counters in document.counters.values():
            if not all(isinstance(value, int) for value in counters.values()):
                raise ValueError("counters are no numbers")
        return document

    def total(self, kind: str, name: str) -> int:
        """Return the sum of a counter over all rings, or over all workers."""
        groups = self.counters.items()
        return sum(each.get(name, 0) for key, each in groups if key.startswith(kind))


class NoStats(StartError):
    """No airlock tells its stats at a path."""

    def __init__(self, path: str, reason: str, *, foreign: bool = False) -> None:
        super().__init__(f"no airlock's stats at {path}: {reason}")
        self.path = path
        self.foreign = foreign
        """The socket is of another kind, or no process has it."""


@dataclass(frozen=True)
class Answer:
    """An airlock's answer: as it came, and its meaning."""

    path: str
    text: str
    document: Document


def ask_all(paths: Sequence[str]) -> tuple[list[Answer], list[NoStats]]:
    """Ask at several sockets at the same time; returns (answers, failures).

    A folder stands for the sockets in it that airlocks have made for their stats.
    """
    named: dict[str, bool] = {}
    """Each socket's path, and whether the user named it, not its folder."""
    for path in paths:
        if os.path.isdir(path):
            named |= dict.fromkeys(_sockets_in(path), False)
        else:
            named[path] = True
    with ThreadPoolExecutor(AT_ONCE) as pool:
        told = list(pool.map(_try, named))
    answers = _once([each for each in told if isinstance(each, Answer)], named)
    failures = [each for each in told if isinstance(each, NoStats)]
    return answers, [each for each in failures if named[each.path] or not each.foreign]


def _once(answers: Sequence[Answer], named: dict[str, bool]) -> list[Answer]:
    """Leave out the second socket of an airlock that was found in a folder: it answers
    at its --control-path and at its --stats-path.
    """
    seen: set[tuple[int, str]] = set()
    found = []
    for each in answers:
        airlock = (each.document.pid, each.document.name)
        if named[each.path] or not each.document.pid or airlock not in seen:
            found.append(each)
        seen.add(airlock)
    return found


def _sockets_in(folder: str) -> list[str]:
    try:
        paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    except OSError as error:
        raise StartError(f"can't look into {folder}: {reason_of(error)}") from None
    return [path for path in paths if _is_socket(path)]


def _is_socket(path: str) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISSOCK(os.stat(path).st_mode)
    return False


def _try(path: str) -> Answer | NoStats:
    try:
        text = ask(path)
        return Answer(path, text, parse(text, path))
    except NoStats as error:
        return error


def ask(path: str) -> str:
    """Return the answer of the airlock at this path. NoStats: there is none."""
    until = time.monotonic() + PATIENCE
    data = bytearray()
    with socket.socket(socket.AF_UNIX, KIND) as sock:
        sock.settimeout(PATIENCE)
        try:
            connect(sock, path, until)
            sock.shutdown(socket.SHUT_WR)  # at a --control-path this asks for stats
            while part := sock.recv(1 << 16):
                data += part
                sock.settimeout(max(0.001, until - time.monotonic()))
                if len(data) > LARGEST:
                    raise NoStats(path, "it says too much")
        except OSError as error:
            raise _no_stats(path, error) from None
    return data.decode(errors="replace")


def connect(sock: socket.socket, path: str, until: float) -> None:
    """Connect; while the queue of the socket is full, try again until a time."""
    while True:
        try:
            sock.connect(path)
            return
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.02)


def _no_stats(path: str, error: OSError) -> NoStats:
    reason = error.strerror or "no answer"
    if error.errno == errno.EPROTOTYPE:
        reason = "the socket is a VMM's or a back-end's; see run --stats-path"
    elif error.errno == errno.ECONNREFUSED:
        reason = "no process listens there"
    foreign = error.errno in (errno.EPROTOTYPE, errno.ECONNREFUSED)
    return NoStats(path, reason, foreign=foreign)


def parse(text: str, path: str) -> Document:
    """Return the document in an answer. NoStats: it is no airlock's."""
    try:
        return Document.of(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise NoStats(path, "it is another's") from None
