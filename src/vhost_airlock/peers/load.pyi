# SPDX-License-Identifier: Apache-2.0
from typing_extensions import Buffer, disjoint_base

@disjoint_base
class Load:
    def __new__(
        cls,
        *,
        ring: Buffer,
        queue_size: int,
        base: int,
        event_idx: bool,
        indirect: bool,
        private: tuple[Buffer, int],
        data: tuple[Buffer, int],
        depth: int,
        size: int,
        segment: int,
        write: bool,
        random_order: bool,
        first: int,
        blocks: int,
        seed: int,
        kick: int,
        call: int,
        err: int,
        connection: int,
        busy_wait: bool,
    ) -> Load: ...
    def run(self, begin: int, end: int) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...
    def counters(self) -> dict[str, int]: ...
    def latencies(self) -> dict[int, int]: ...

def private_size(depth: int, size: int, segment: int) -> int: ...
