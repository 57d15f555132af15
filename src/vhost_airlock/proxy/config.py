# SPDX-License-Identifier: Apache-2.0
"""The user's choices for a device, in one frozen object."""

from __future__ import annotations

from ..log import Logger
from ..record import record
from .caches import LEAST
from .features import NOTHING, Withheld

MIB = 1 << 20
DEVICE_LOGS = "vhost_airlock.device."
"""Begins the name of each device's log; the device's name follows."""
MRG_RXBUF = 1 << 15
"""VIRTIO_NET_F_MRG_RXBUF: a packet may be in several chains (virtio 1.3, 5.1.6.4).
Another device's feature of this number costs speed at most."""


@record
class Config:
    """How the airlock treats a device: its memory, its threads, and its time-outs."""

    name: str = "device"
    """Names the device in the log and in stats."""
    copy: str = "full"
    """One of dataplane.pump.POLICIES."""
    whole_batches: int = MRG_RXBUF
    """Feature bits of the device. If one of them is accepted, the guest sees at once
    all the requests that the back-end shows at once."""
    withhold_features: Withheld = NOTHING
    """Features that the front is not offered."""
    has_error: bool = False
    """A request of the device can end with an error: a one in its last byte."""
    grows: bool = False
    """Its configuration space begins with a capacity of eight bytes, which may be
    larger when another back takes the place of one that is gone."""
    pool_limit: int = 256 * MIB
    """The most bounce buffer memory that the device may use, in bytes."""
    cached: int = LEAST
    """The bytes in flight that processors' caches hold: a ring may always have so much,
    and more if its back can use it. 0: it may always have more."""
    request_limit: int = 1024 * MIB
    """The bytes of the largest single request, which may be more than the pool has."""
    poll_us: int = 200
    """The longest time to poll before sleeping, in microseconds."""
    workers: int = 1
    """Threads of the data plane, over which rings are spread."""
    worker_cpus: tuple[int, ...] = ()
    """The numbers of processors that they are bound to, in turn; none: any."""
    timeout: float = 5.0
    """Seconds that the back has to answer a message."""
    drain_timeout: float = 5.0
    """Seconds to wait, when rings stop, for requests that the back still works on."""
    stateful: str = ""
    """The state of the device type's back-ends, in words, by which another one can take
    the place of one only if it gets that state; empty: it needs none."""
    recover: bool = False
    """The session goes on when the back is lost, if another one comes."""
    recover_time: float = 30.0
    """Seconds that another back may take to come."""
    recover_times: int = 5
    """The losses of a back within a minute after which no other one is looked for."""

    @property
    def log(self) -> Logger:
        """The device's log, whose lines name the device."""
        return Logger(DEVICE_LOGS + self.name)
