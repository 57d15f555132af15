# SPDX-License-Identifier: Apache-2.0
"""Device types (virtio 1.3, section 5): their defaults, or why they can't be isolated.

vhost-user does not say which kind of device it carries, and the airlock does not look.
A type that the user names only chooses defaults, or is refused: some devices' requests
carry guest addresses in their payload, which mean nothing in isolated memory.
"""

from __future__ import annotations

from ..errors import StartError, UsageError
from ..record import record
from .config import MRG_RXBUF


@record
class DeviceType:
    """A type of device. `name` is the one in QEMU's vhost-user.json."""

    number: int
    name: str
    copy: str = "full"
    """The copy policy that fits; one of dataplane.pump.POLICIES."""
    whole_batches: int = 0
    """Feature bits with which a request may be in several chains."""
    has_error: bool = False
    """A request can end with an error: a one in its last byte, if it has any to write.
    Otherwise its end says nothing of success."""
    grows: bool = False
    """Its configuration space begins with a capacity of eight bytes, which may grow."""
    refused: str = ""
    """Why it can't be isolated; empty: it can."""
    recovers: bool = False
    """Another back-end takes the place of one that is gone, unless the user says no."""
    stateful: str = ""
    """The state by which no other back-end can do so; empty: one can."""

    def require_isolation(self) -> None:
        """Raise StartError if it can't be isolated."""
        if self.refused:
            raise StartError(f"a {self.name} device can't be isolated: {self.refused}")


FILES = "open files and locks"
LINES = "the state of hardware, on which a request that is done twice has an effect"

TYPES = (
    # A posted receive buffer is far larger than most packets, and back-ends say exactly
    # how much they have written.
    DeviceType(
        1,
        "net",
        copy="used",
        whole_batches=MRG_RXBUF,
        has_error=True,
        recovers=True,
    ),
    # A request that is not done may be done twice, and blocks come out the same.
    DeviceType(2, "block", has_error=True, grows=True, recovers=True),
    DeviceType(3, "console"),
    DeviceType(4, "rng", recovers=True),
    DeviceType(5, "balloon", refused="its requests are lists of guest pages"),
    DeviceType(8, "scsi"),
    DeviceType(9, "9p", stateful=FILES),
    DeviceType(16, "gpu", refused="its requests carry guest addresses"),
    DeviceType(18, "input"),
    DeviceType(19, "vsock", recovers=True),
    DeviceType(20, "crypto", stateful="sessions with keys"),
    DeviceType(23, "iommu", refused="its requests are mappings of guest addresses"),
    DeviceType(24, "mem", refused="its requests are blocks of guest memory"),
    DeviceType(25, "sound", stateful="streams"),
    DeviceType(26, "fs", stateful=FILES),
    DeviceType(27, "pmem", refused="it is guest memory itself"),
    DeviceType(32, "scmi", stateful=LINES),
    DeviceType(34, "i2c", stateful=LINES),
    DeviceType(36, "can"),
    DeviceType(41, "gpio", stateful=LINES),
    DeviceType(45, "spi", stateful=LINES),
    DeviceType(48, "media", refused="its requests can carry lists of guest pages"),
)


def find_type(text: str) -> DeviceType:
    """Return the type with this name or number, or raise UsageError."""
    for kind in TYPES:
        if text in (kind.name, str(kind.number)):
            return kind
    names = ", ".join(kind.name for kind in TYPES)
    raise UsageError(f"--device-type {text}: not one of {names}")
