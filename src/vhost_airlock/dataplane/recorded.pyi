# SPDX-License-Identifier: Apache-2.0
from typing import Final

NOT_RECORDED: Final[str]
OTHER_RING: Final[str]

def erase(at: int) -> bool: ...
