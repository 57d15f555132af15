from typing_extensions import disjoint_base

@disjoint_base
class Mapping:
    address: int
    size: int
    def __init__(self, fd: int, size: int, offset: int = 0) -> None: ...
    def close(self) -> None: ...
