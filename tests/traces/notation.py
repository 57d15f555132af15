# SPDX-License-Identifier: Apache-2.0
"""How traces are written down: the messages of one phase, in the order that they have.

    SET_FEATURES SET_MEM_TABLE! (NUM BASE=told ADDR KICK!) [ENABLE=1!]

A word is a request of the specification; for those of a ring, SET_VRING_ is left out.

- `!`: the VMM sets need_reply on this message.
- `=`: what the message says, where there is a choice (speaker.py). BASE alone says 0.
- `|`: the first of these requests whose protocol feature is in use. A message of which
  none can be sent is left out, as the VMM leaves it out.
- `( )`: these messages for one ring after the other, of the rings that the guest uses.
- `[ ]`: the same for all rings of the device, those too that the guest does not use.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vhost_airlock.vhost.wire import Request

WORD = re.compile(r"([A-Z_|]+)(?:=([a-z0-9+]+))?(!?)$")
OF_A_RING = ("NUM", "BASE", "ADDR", "KICK", "CALL", "ERR", "ENABLE")
CLOSING = {"(": ")", "[": "]"}


@dataclass(frozen=True, slots=True)
class Say:
    """One message."""

    requests: tuple[Request, ...]
    """The first of them that can be sent is meant."""
    value: str
    """Its content; empty where there is no choice."""
    need_reply: bool


@dataclass(frozen=True, slots=True)
class Each:
    """Messages that are sent for one ring after the other."""

    unused_too: bool
    """For all rings of the device, or for those that the guest uses?"""
    said: tuple[Say, ...]


Step = Say | Each


def parse(text: str) -> tuple[Step, ...]:
    """Return the steps that a text stands for."""
    steps: list[Step] = []
    group: list[Say] = []
    opened = ""
    for word in re.findall(r"[()\[\]]|[^\s()\[\]]+", text):
        if not opened and word in CLOSING:
            opened, group = word, []
        elif opened and word == CLOSING[opened]:
            steps.append(Each(opened == "[", tuple(group)))
            opened = ""
        elif opened:
            group.append(say(word))
        else:
            steps.append(say(word))
    if opened:
        raise ValueError(f"no {CLOSING[opened]} ends the group in {text!r}")
    return tuple(steps)


def say(word: str) -> Say:
    """Return the message that a word stands for."""
    match = WORD.match(word)
    if match is None:
        raise ValueError(f"{word!r} is no message")
    names, value, need_reply = match.groups()
    requests = [
        f"SET_VRING_{name}" if name in OF_A_RING else name for name in names.split("|")
    ]
    return Say(tuple(Request[name] for name in requests), value or "", bool(need_reply))
