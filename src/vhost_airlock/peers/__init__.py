# SPDX-License-Identifier: Apache-2.0
"""Both ends of a vhost-user device in plain Python, without the airlock.

For users of the library, the demo, the benchmark and the tests: a virtqueue from the
driver's and the device's end, guest memory, a block back-end and a guest that drives
one. A load on such a device is the only part that is compiled.
"""

from .device import DeviceRing
from .driver import DriverRing
from .ring import (
    Buffer,
    Chain,
    Descriptor,
    RingFull,
    SplitLayout,
    SplitRing,
    TableArea,
)

__all__ = [
    "Buffer",
    "Chain",
    "Descriptor",
    "DeviceRing",
    "DriverRing",
    "RingFull",
    "SplitLayout",
    "SplitRing",
    "TableArea",
]
