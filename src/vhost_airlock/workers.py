"""The threads of the data plane, of which each ring has one.

A ring's own worker is paused to change that ring; all of them are paused to change
what rings share: the guest's memory and the pool.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from .dataplane.worker import Worker
from .vhost.fds import HasFileno


class Workers:
    """`count` threads, started at once. They signal `events`, see Worker."""

    def __init__(self, count: int, events: HasFileno, *, poll_us: int) -> None:
        self._workers = [Worker(events.fileno(), poll_us=poll_us) for _ in range(count)]
        self._threads = [
            threading.Thread(target=worker.run, name=f"airlock-{i}", daemon=True)
            for i, worker in enumerate(self._workers)
        ]
        for thread in self._threads:
            thread.start()

    def of(self, index: int) -> Worker:
        """The worker of the ring with this number: neighbours have different ones."""
        return self._workers[index % len(self._workers)]

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """A context in which all of them stand still."""
        with contextlib.ExitStack() as paused:
            for worker in self._workers:
                paused.enter_context(worker.pause())
            yield

    def counters(self) -> dict[str, dict[str, int]]:
        """What each has done, by its name."""
        return {
            f"worker {i}": worker.counters() for i, worker in enumerate(self._workers)
        }

    def close(self) -> None:
        """End all threads; no pump runs any more."""
        for worker in self._workers:
            worker.stop()
        for thread in self._threads:
            thread.join()
        # Now, and not when the last that has one goes: an error in a record of the log
        # may hold half of a session.
        for worker in self._workers:
            worker.close()
        self._workers.clear()
