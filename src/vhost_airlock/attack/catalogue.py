# SPDX-License-Identifier: Apache-2.0
"""Attacks and their outcomes, from good to bad."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Generic, TypeVar

from ..errors import UsageError
from ..vhost.wire import Feature, ProtocolFeature

Scene = TypeVar("Scene")


class Verdict(IntEnum):
    """The state of the program after an attack; lower is better."""

    HELD = 0
    """All rings go on."""
    RING_STOPPED = 1
    """The attacked ring stopped, said so, and works again once it is set up anew."""
    RING_LOST = 2
    """The attacked ring can't be set up anew in this connection; others go on."""
    CONNECTION_LOST = 3
    """Other rings of the connection stopped too; a new connection is served."""
    HANGS = 4
    """The program lives, but a new connection is not served."""
    PROCESS_GONE = 5
    """No process listens any more."""
    GUEST_HARMED = 6
    """Guest memory was changed outside of requests, or data came back wrong."""
    NOT_RUN = 7
    """The attack could not begin."""

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True, slots=True)
class Attack(Generic[Scene]):
    """One deed of a hostile peer."""

    name: str
    what: str
    """A description, one line."""
    deed: Callable[[Scene], None]
    worst: Verdict = Verdict.RING_STOPPED
    """The worst outcome with which the program still counts as having held."""
    without: tuple[Feature, ...] = ()
    """Features that must not be in use."""
    also: tuple[ProtocolFeature, ...] = ()
    """Others that are to be in use, if the program has them."""

    def held(self, verdict: Verdict) -> bool:
        return verdict <= self.worst


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of an attack."""

    attack: Attack[Any]
    verdict: Verdict
    why: str = ""
    """The observation, if the program did not hold."""
    seconds: float = 0.0

    @property
    def held(self) -> bool:
        return self.attack.held(self.verdict)


class Catalogue(Generic[Scene]):
    """The attacks of one kind of peer. `attack` is a decorator for their functions.

    All of them want the features in `also`, beside the usual ones.
    """

    def __init__(
        self, worst: Verdict, *, also: tuple[ProtocolFeature, ...] = ()
    ) -> None:
        self.worst = worst
        self.also = also
        self.attacks: list[Attack[Scene]] = []

    def add(
        self,
        name: str,
        what: str,
        deed: Callable[[Scene], None],
        *,
        worst: Verdict | None = None,
        without: tuple[Feature, ...] = (),
    ) -> None:
        worst = self.worst if worst is None else worst
        self.attacks.append(Attack(name, what, deed, worst, without, self.also))

    def attack(
        self, worst: Verdict | None = None
    ) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
        """Add a function, by its name and the first line of its docstring."""

        def add(deed: Callable[[Scene], None]) -> Callable[[Scene], None]:
            what = (deed.__doc__ or "").strip().splitlines()[0].rstrip(".")
            self.add(deed.__name__.replace("_", "-"), what, deed, worst=worst)
            return deed

        return add


def select(
    attacks: Iterable[Attack[Any]], patterns: Sequence[str]
) -> list[Attack[Any]]:
    """Return the attacks whose name matches a pattern; all if there is no pattern."""
    attacks = list(attacks)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(each.name, pattern) for each in attacks):
            raise UsageError(f"no attack here is called {pattern}")
    return [
        each
        for each in attacks
        if not patterns or any(fnmatch.fnmatchcase(each.name, p) for p in patterns)
    ]
