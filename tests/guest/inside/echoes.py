# SPDX-License-Identifier: Apache-2.0
"""Frames that come back as they were sent, without an end, while the guest moves.

A network may lose frames when the guest moves, but it must not change any.
"""

import os
import threading

from tests.guest.inside.frames import frames, listen, take_socket

WINDOW = 16
LARGEST = 1514
LOST = 1.0
"""Seconds after which what has not come back is lost."""


class Echoes:
    def __init__(self) -> None:
        listen()
        self.socket = take_socket()
        self.socket.settimeout(LOST)
        self.sent = list(frames(1, WINDOW, LARGEST))
        self.rounds = 0
        self.whole = 0
        """Rounds in which all frames came back."""
        self.failure = ""
        self.stopping = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        processors = sorted(os.sched_getaffinity(0))
        while not self.stopping and not self.failure:
            # Each processor has a pair of queues.
            processor = processors[self.rounds % len(processors)]
            os.sched_setaffinity(0, [processor])
            try:
                whole = self.round()
            except Exception as error:
                whole, self.failure = False, repr(error)
            with self.changed:
                self.rounds += 1
                self.whole += whole
                self.changed.notify()

    def round(self) -> bool:
        """Did all frames come back? ValueError if something else did."""
        for frame in self.sent:
            self.socket.send(frame)
        left = set(self.sent)
        while left:
            try:
                found = self.socket.recv(65536)
            except TimeoutError:
                return False
            if found not in self.sent:
                raise ValueError(f"{len(found)} bytes: {found[:64].hex()}")
            left.discard(found)
        return True


_echoes: list[Echoes] = []


def start() -> None:
    _echoes.append(Echoes())


def go_on(rounds: int = 20) -> None:
    """Wait until so many more rounds were whole."""
    echoes = _echoes[-1]
    wanted = echoes.whole + rounds
    with echoes.changed:
        echoes.changed.wait_for(
            lambda: echoes.failure or echoes.whole >= wanted, timeout=60
        )
    if echoes.failure or echoes.whole < wanted:
        raise ValueError(f"{echoes.whole} of {echoes.rounds}: {echoes.failure}")


def stop() -> int:
    """How many rounds lost a frame."""
    echoes = _echoes.pop()
    echoes.stopping = True
    echoes.thread.join()
    if echoes.failure:
        raise ValueError(echoes.failure)
    return echoes.rounds - echoes.whole
