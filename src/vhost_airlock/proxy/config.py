# SPDX-License-Identifier: Apache-2.0
"""What the user chose, in one frozen object."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Config:
    """Where front and back are, and how the airlock treats them.

    Exactly one of `socket_path`, `fd` and `front_connect` is set, and exactly one of
    `backend`, `backend_listen` and `command`.
    """

    socket_path: str | None = None
    """Where to listen for the front."""
    fd: int | None = None
    """A socket for the front that we were given, listening or connected."""
    front_connect: str | None = None
    """Where the front listens for us."""
    backend: str | None = None
    """Where the back listens."""
    backend_listen: str | None = None
    """Where to wait for the back to connect."""
    command: tuple[str, ...] = ()
    """What starts the back, with a place for a socket's number: process/program.py."""
    no_wait: bool = False
    """The back-end must be there at the start; otherwise the first one is awaited."""
    keep_backend: bool = False
    """Hold the connection to the back from one front to the next."""
    exit_with_backend: bool = False
    """End when the back goes away; otherwise wait for the next front."""
    copy: str = "full"
    """One of dataplane.pump.POLICIES."""
    pool_limit: int = 256 * MIB
    """The most bounce buffer memory that the device may use, in bytes."""
    poll_us: int = 200
    """The longest time to poll before sleeping, in microseconds."""
    workers: int = 1
    """Threads of the data plane, over which rings are spread."""
    worker_cpus: tuple[int, ...] = ()
    """The numbers of processors that they are bound to, in turn; none: any."""
    timeout: float = 5.0
    """Seconds that the back has to answer a message."""
    drain_timeout: float = 5.0
    """Seconds that requests in flight have to end when a ring stops."""
    stats_path: str | None = None
    """Where to answer who wants to know the counters."""
    log_level: str = "warning"
    sandbox: bool = True
    """Give up what the running process does not need; off is for debugging."""
