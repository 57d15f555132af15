# SPDX-License-Identifier: Apache-2.0
"""The results of attacks, as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from .catalogue import Attack, Outcome, Verdict


class Report:
    """Prints a line for each attack as it ends, and a summary."""

    def __init__(self, attacks: Sequence[Attack[Any]], out: TextIO | None) -> None:
        self.outcomes: list[Outcome] = []
        self._out = out
        self._width = max((len(attack.name) for attack in attacks), default=0)

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        mark = " " if outcome.held else "!"
        name = outcome.attack.name.ljust(self._width)
        verdict = str(outcome.verdict).ljust(15)
        why = "" if outcome.held else outcome.why
        self._line(f"{mark} {name}  {verdict}  {outcome.seconds:5.1f} s  {why}")

    @property
    def held(self) -> bool:
        """Did the program hold against all of them?"""
        return bool(self.outcomes) and all(each.held for each in self.outcomes)

    def conclude(self) -> None:
        """Print the number of attacks that held, and the verdicts of the others."""
        held = sum(outcome.held for outcome in self.outcomes)
        self._line("")
        self._line(f"{held} of {len(self.outcomes)} attacks held")
        for verdict in Verdict:
            names = [
                outcome.attack.name
                for outcome in self.outcomes
                if outcome.verdict is verdict and not outcome.held
            ]
            if names:
                self._line(f"{verdict}: {', '.join(names)}")

    def as_dict(self) -> dict[str, Any]:
        return {
            "held": self.held,
            "attacks": [
                {
                    "name": outcome.attack.name,
                    "what": outcome.attack.what,
                    "held": outcome.held,
                    "verdict": str(outcome.verdict),
                    "why": outcome.why,
                    "seconds": round(outcome.seconds, 3),
                }
                for outcome in self.outcomes
            ],
        }

    def _line(self, text: str) -> None:
        if self._out is not None:
            print(text.rstrip(), file=self._out, flush=True)


def listing(groups: Iterable[tuple[str, Sequence[Attack[Any]]]]) -> str:
    """Return the catalogue, a line for each attack."""
    lines: list[str] = []
    for title, attacks in groups:
        lines += ["", f"{title}:"] if lines else [f"{title}:"]
        width = max(len(attack.name) for attack in attacks)
        lines += [f"  {attack.name.ljust(width)}  {attack.what}" for attack in attacks]
    return "\n".join(lines)
