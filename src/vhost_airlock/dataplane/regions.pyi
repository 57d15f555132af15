# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

from typing_extensions import disjoint_base

@disjoint_base
class GuestMemory:
    def set_regions(self, regions: Sequence[tuple[int, int, int]]) -> None: ...
    def set_log(self, address: int, size: int) -> None: ...
    def carry_over(self, address: int, size: int) -> bool: ...
