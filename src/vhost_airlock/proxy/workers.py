# SPDX-License-Identifier: Apache-2.0
"""The threads of the data plane, of which each ring has one.

A ring's own worker is paused to change that ring; all of them are paused to change
the memory that rings share: the guest's, and the pool.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence

from ..dataplane.worker import Worker
from ..log import Logger
from ..vhost.fds import HasFileno


class Workers:
    """`count` threads, started at once. They signal `events`, see Worker.

    OSError, MemoryError or RuntimeError if the system has no room for all of them.
    `cpus` are processors that they are bound to, in turn; without, they run on any.
    """

    def __init__(
        self,
        count: int,
        events: HasFileno,
        *,
        poll_us: int,
        cpus: Sequence[int] = (),
        log: Logger,
    ) -> None:
        self._workers: list[Worker] = []
        self._threads: list[threading.Thread] = []
        try:
            for i in range(count):
                worker = Worker(events.fileno(), poll_us=poll_us)
                thread = threading.Thread(
                    target=_run,
                    args=(worker, cpus[i % len(cpus)] if cpus else None, log),
                    name=f"airlock-{i}",
                    daemon=True,
                )
                thread.start()
                self._workers.append(worker)
                self._threads.append(thread)
        except BaseException:
            self.close()
            raise

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
        """The numbers of each worker, by its name."""
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


def _run(worker: Worker, cpu: int | None, log: Logger) -> None:
    # The main thread waits in poll(), which a signal to another thread does not end.
    ending = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    if cpu is not None:
        try:
            os.sched_setaffinity(0, {cpu})
        except OSError as error:  # it was taken from us, or away, since the start
            log.warning(
                "processor %d of --worker-cpus can't be used: %s; this worker runs"
                " on any",
                cpu,
                error.strerror,
            )
    worker.run()
