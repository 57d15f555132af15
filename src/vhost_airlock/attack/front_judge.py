# SPDX-License-Identifier: Apache-2.0
"""Attacks a program that serves front-ends, and judges its state afterwards.

After the attack, on the same connection, another ring must still complete a request;
then the attacked one must, once it is stopped and set up anew. After that, a new
connection must be served.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import AirlockError, Disconnected
from ..peers.guest import BlkGuest
from .catalogue import Attack, Outcome, Verdict
from .driving import connected, read, set_up_anew
from .guest_scene import QUEUE_SIZE, GuestScene
from .program import Program

FAILURES = (AirlockError, OSError, ValueError)
"""Exceptions of a guest when the program does not do its part."""
PAUSE = 0.05
"""Seconds between two tries to be served by a program that may be ending."""


def outcomes(
    program: Program,
    attacks: Sequence[Attack[Any]],
    judge: Callable[[Attack[Any]], tuple[Verdict, str]],
) -> Iterator[Outcome]:
    """Judge attacks one after the other, each on a program that runs."""
    for attack in attacks:
        began = time.monotonic()
        verdict, why = judge(attack)
        yield Outcome(attack, verdict, why, time.monotonic() - began)
        if verdict in (Verdict.HANGS, Verdict.PROCESS_GONE):
            program.restart()


def run(
    program: Program,
    attacks: Sequence[Attack[Any]],
    scene: Callable[[BlkGuest], GuestScene],
) -> Iterator[Outcome]:
    """Run attacks one after the other."""
    return outcomes(program, attacks, lambda attack: _judge(program, attack, scene))


def _judge(
    program: Program,
    attack: Attack[Any],
    scene: Callable[[BlkGuest], GuestScene],
) -> tuple[Verdict, str]:
    try:
        program.ensure()
        guest = _ready(program, attack)
    except FAILURES as error:
        return Verdict.NOT_RUN, str(error)
    try:
        try:
            attacker = scene(guest)
            attack.deed(attacker)
            attacker.settle()
        except FAILURES as error:
            seen = str(error)
        else:
            seen = ""
        verdict, why = _same_connection(guest, program.timeout)
    finally:
        guest.close()
    worse, reason = _new_connection(program)
    if worse:
        return worse, "; ".join(filter(None, (why or seen, reason)))
    return verdict, why


def _ready(program: Program, attack: Attack[Any]) -> BlkGuest:
    """A guest all of whose rings work."""
    guest = connected(
        program.path,
        queue_size=QUEUE_SIZE,
        timeout=program.timeout,
        without=attack.without,
        also=attack.also,
    )
    try:
        guest.start()
        for queue in guest.queues:
            read(guest, queue.index, program.timeout)
    except BaseException:
        guest.close()
        raise
    return guest


def _same_connection(guest: BlkGuest, timeout: float) -> tuple[Verdict, str]:
    """Judge the connection on which the attack was."""
    try:
        for queue in guest.queues[1:]:
            read(guest, queue.index, timeout)
        guest.front.barrier()
    except FAILURES as error:
        return Verdict.CONNECTION_LOST, str(error)
    stopped = is_set(guest.queues[0].err_fd.fileno())
    try:
        set_up_anew(guest)
        for queue in guest.queues:
            read(guest, queue.index, timeout)
    except Disconnected as error:
        return Verdict.CONNECTION_LOST, str(error)
    except FAILURES as error:
        return Verdict.RING_LOST, f"set up anew: {error}"
    return (Verdict.RING_STOPPED if stopped else Verdict.HELD), ""


def is_set(eventfd: int) -> bool:
    return bool(select.select([eventfd], [], [], 0)[0])


def _new_connection(program: Program) -> tuple[Verdict, str]:
    """Is a new connection served?"""
    deadline = time.monotonic() + program.timeout
    while True:
        try:
            guest = connected(
                program.path, queue_size=QUEUE_SIZE, timeout=program.timeout
            )
            try:
                guest.start()
                for queue in guest.queues:
                    read(guest, queue.index, program.timeout)
                guest.stop()
            finally:
                guest.close()
            return Verdict.HELD, ""
        except FAILURES as error:
            failure = error
        if program.gone:
            return Verdict.PROCESS_GONE, program.ending()
        if time.monotonic() > deadline:
            return Verdict.HANGS, f"a new connection: {failure}"
        time.sleep(PAUSE)
