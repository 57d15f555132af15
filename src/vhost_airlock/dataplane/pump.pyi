# SPDX-License-Identifier: Apache-2.0
from typing import Final, Self

from typing_extensions import disjoint_base

from vhost_airlock.dataplane.pool import Pool
from vhost_airlock.dataplane.regions import GuestMemory

POLICIES: Final[dict[str, int]]
FAULTS: Final[dict[int, str]]
BACK_SIGNALLED: Final[int]

def area_bytes(size: int) -> int: ...
def shadow_parts(size: int) -> tuple[int, int, int]: ...

@disjoint_base
class Pump:
    attached: bool
    fault: int
    reason: str | None
    drained: bool
    tells: bool
    outstanding: int
    quarantined: int
    def __new__(
        cls, index: int, memory: GuestMemory, pool: Pool, policy: str = "full"
    ) -> Self: ...
    def attach(
        self,
        *,
        size: int,
        base: int,
        guest: tuple[int, int, int],
        guest_event_idx: bool,
        guest_indirect: bool,
        shadow: tuple[int, int],
        shadow_event_idx: bool,
        shadow_indirect: bool,
        whole_batches: bool = False,
    ) -> None: ...
    def detach(self, fetched: int | None = None) -> tuple[int, int, bool]: ...
    def move(self, guest: tuple[int, int, int] | None) -> None: ...
    def step(self, budget: int = 256) -> tuple[int, bool, bool]: ...
    def rest(self) -> bool: ...
    def set_taking(self, taking: bool) -> None: ...
    def kick(self) -> None: ...
    def set_draining(self, draining: bool) -> None: ...
    def set_fault(self, fault: int) -> None: ...
    def set_guaranteed(self, size: int) -> None: ...
    def set_fds(
        self,
        *,
        kick_in: int = -1,
        call_out: int = -1,
        kick_out: int = -1,
        call_in: int = -1,
    ) -> None: ...
    def owes(self, fetched: int) -> int: ...
    def counters(self) -> dict[str, int]: ...
