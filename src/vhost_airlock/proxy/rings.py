# SPDX-License-Identifier: Apache-2.0
"""All rings of a device, with what they share: the workers that run them, the pool, and
the search for a request over which backs are lost.
"""

from __future__ import annotations

import math
import time

from ..dataplane.pump import Pump
from ..vhost.fds import HasFileno, drain, eventfd
from .back_side import BackSide
from .config import Config
from .dirty_log import DirtyLog
from .front_memory import FrontMemory
from .inflight import InflightRecord
from .pool_policy import PoolPolicy
from .ring import Ring
from .trial import Trial
from .workers import Workers


class Rings(dict[int, Ring]):
    """The rings of one device by their numbers, and their owner. Each is made when it
    is first asked for.
    """

    def __init__(
        self,
        config: Config,
        back_side: BackSide,
        memory: FrontMemory,
        record: InflightRecord,
        dirty_log: DirtyLog,
    ) -> None:
        super().__init__()
        self.config = config
        self.back_side = back_side
        self.memory = memory
        self.record = record
        self.dirty_log = dirty_log
        self._events = eventfd()
        self.events: HasFileno = self._events
        try:
            self.workers = Workers(
                config.workers,
                self.events,
                poll_us=config.poll_us,
                cpus=config.worker_cpus,
                log=config.log,
            )
        except BaseException:
            self._events.close()
            raise
        self._trial = Trial(self, config.log, config.drain_timeout)
        self._pool = PoolPolicy(self.workers)

    def __missing__(self, index: int) -> Ring:
        ring = self[index] = Ring(index, self.workers.of(index), self)
        self._trial.join(ring)
        return ring

    @property
    def attached(self) -> bool:
        """Is any of them started?"""
        return any(ring.attached for ring in self.values())

    @property
    def quarantined(self) -> int:
        """Chains that stops have left with the back, which may still write to them."""
        return sum(ring.coupling.quarantined for ring in self.values())

    def start(self) -> None:
        """Start every ring for which the front has told all that a start takes."""
        if self.back_side.away:
            return
        for ring in self.values():
            ring.start_if_ready()

    def stop(self) -> None:
        """Stop all rings. They share one deadline, and nobody wants their bases."""
        self.quiesce()
        for ring in self.values():
            # A guest whose VMM has left, or resets it, may use its memory anew by now.
            ring.stop(quietly=True)

    def quiesce(self) -> None:
        """Take no more chains; those in flight go on to end. A stop follows."""
        for ring in self.values():
            ring.quiesce()

    def disable(self) -> None:
        """The front disables all rings."""
        for ring in self.values():
            ring.enable(False)

    def lose_back(self) -> None:
        """The back is gone: rings stop without it, if they have not stopped yet."""
        had = {ring: ring.coupling.collect_last() for ring in self.values()}
        for ring, count in had.items():
            ring.lose_back(others=sum(had.values()) > count)
        self._pool = PoolPolicy(self.workers)

    def start_again(self) -> None:
        """There is another back in the place of the one that was lost."""
        self._trial.begin()
        self.start()

    def relocate(self) -> None:
        """The guest's memory has changed; the workers must stand still."""
        for ring in self.values():
            ring.relocate()

    def set_logging(self) -> None:
        """Log stores, or not, by the front's word as it is now; no worker runs."""
        for ring in self.values():
            ring.coupling.set_logging()

    def _pumps(self) -> list[Pump]:
        return [ring.pump for ring in self.values() if ring.pump is not None]

    def share_pool(self) -> None:
        self._pool.share(self.back_side.back, self._pumps())

    def look(self) -> None:
        """See to the signals of the workers, and to all that is due by now."""
        drain(self.events)
        for ring in self.values():
            ring.check()
            ring.tell_waiting()
        self.dirty_log.look(self._pumps())
        self._trial.look()
        if back := self.back_side.settled:
            self._pool.look(back)

    def wait(self) -> float:
        """Seconds until look() has something to do by itself."""
        tell_at = min((ring.tell_at for ring in self.values()), default=math.inf)
        found = [max(0.0, tell_at - time.monotonic()), self._trial.wait()]
        back = self.back_side.settled
        if back and (wait := self._pool.next_look(back)) is not None:
            found.append(wait)
        return min(found)

    def counters(self) -> dict[str, dict[str, int]]:
        """The numbers of each ring, and of the workers. Any thread may ask."""
        found = {
            f"ring {ring.index}": ring.counters()
            for ring in self._in_order()
            if ring.pump is not None
        }
        return found | self.workers.counters()

    def conditions(self) -> dict[str, dict[str, object]]:
        """The state of each ring, by its number, and its fault. Any thread may ask."""
        return {f"ring {ring.index}": ring.condition() for ring in self._in_order()}

    def _in_order(self) -> list[Ring]:
        return sorted(self.values(), key=lambda ring: ring.index)

    def abandon(self) -> None:
        """Let go of the rings without the back."""
        for ring in self.values():
            ring.abandon()

    def close(self) -> None:
        """Give back everything; all rings are abandoned."""
        self.workers.close()
        for ring in self.values():
            ring.close()
        # Sessions are parts of cycles: the pool has a descriptor, and shall not wait
        # for the garbage collector.
        self.clear()
        self._events.close()
