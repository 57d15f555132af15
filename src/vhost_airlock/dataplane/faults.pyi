# SPDX-License-Identifier: Apache-2.0
from typing import Final

FAULTS: Final[dict[int, str]]
DETAILS: Final[dict[int, str]]
