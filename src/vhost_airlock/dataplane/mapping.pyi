# SPDX-License-Identifier: Apache-2.0
from typing_extensions import disjoint_base

@disjoint_base
class Mapping:
    address: int
    size: int
    def __init__(
        self, fd: int, size: int, offset: int = 0, huge_pages: bool = False
    ) -> None: ...
    def empty(self, start: int = 0) -> None: ...
    def close(self) -> None: ...
