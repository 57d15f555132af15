# SPDX-License-Identifier: Apache-2.0
"""Workers that need no thread: a target runs their pumps, or a pause that has ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vhost_airlock.dataplane.pump import Pump
from vhost_airlock.dataplane.worker import Worker
from vhost_airlock.log import Logger
from vhost_airlock.proxy.workers import Workers
from vhost_airlock.vhost.fds import HasFileno

ROUNDS = 1000
"""Far more steps than it takes to move all chains of a ring of these targets."""


class PlayedWorker(Worker):
    """It never runs by itself, so a pause does not wait for anything."""

    def __init__(self, *_: object, **__: object) -> None:
        self._turning: list[Pump] = []
        self._paused = 0

    @contextmanager
    def pause(self, timeout: float = 5.0) -> Iterator[None]:
        self._paused += 1
        try:
            with super().pause(timeout):
                yield
        finally:
            self._paused -= 1
        self.turn()

    def add(self, pump: Pump) -> None:
        super().add(pump)
        if pump not in self._turning:
            self._turning.append(pump)

    def remove(self, pump: Pump) -> None:
        super().remove(pump)
        if pump in self._turning:
            self._turning.remove(pump)

    def turn(self) -> None:
        """Move all chains that can be moved, and arm, unless it is paused."""
        if self._paused:
            return
        for pump in self._turning:
            for _ in range(ROUNDS):
                if not pump.step()[0] and not pump.rest():
                    break
            else:
                raise AssertionError("the worker would never sleep again")


class PlayedWorkers(Workers):
    def __init__(
        self,
        count: int,
        events: HasFileno,
        *,
        poll_us: int,
        cpus: Sequence[int] = (),
        log: Logger,
    ) -> None:
        self._workers = [PlayedWorker(events.fileno()) for _ in range(count)]
        self._threads = []

    def turn(self) -> None:
        for worker in self._workers:
            assert isinstance(worker, PlayedWorker)
            worker.turn()
