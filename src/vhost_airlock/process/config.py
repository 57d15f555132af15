# SPDX-License-Identifier: Apache-2.0
"""The user's options for the process and for its device, in one frozen object."""

from __future__ import annotations

from ..proxy.config import Config
from ..record import record
from .sockets import Group, Rights

FENCES = ("reply", "exit")
"""The first answer of the next back, or that and the end of the old one's process."""


@record
class ProcessConfig:
    """The ways to front and back, and the options of the process beside its device.

    Exactly one of `socket_path`, `fd` and `front_connect` is set, and exactly one of
    `backend`, `backend_listen`, `backend_fd` and `command`.
    """

    socket_path: str | None = None
    """Where to listen for the front."""
    fd: int | None = None
    """The number of an inherited socket for the front, listening or connected."""
    front_connect: str | None = None
    """Where the front listens for us."""
    backend: str | None = None
    """Where the back listens."""
    backend_listen: str | None = None
    """Where to wait for the back to connect."""
    backend_fd: int | None = None
    """The number of an inherited socket of the back: its connection, or one at which to
    wait for it to connect."""
    command: tuple[str, ...] = ()
    """The command that starts the back, with a place for a socket's number, see
    program.py."""
    wait_for: float | None = None
    """Seconds after the start in which the first back-end has to be there, or the
    process ends; None: no limit."""
    no_wait: bool = False
    """The back-end must be there at the start; otherwise the first one is awaited."""
    keep_backend: bool = False
    """Hold the connection to the back from one front to the next."""
    fence: str = "reply"
    """The sign that a lost back does not work on its requests any more, one of FENCES,
    so that another one can have them."""
    exit_with_backend: bool = False
    """End when the back goes away; otherwise wait for the next front."""
    exit_with_pipe: int | None = None
    """The number of an inherited pipe: end when no process can write to it any more."""
    once: bool = False
    """End when the first front has left; otherwise wait for the next one."""
    stats_path: str | None = None
    """Where to listen for readers of the counters."""
    stats_fd: int | None = None
    """The number of an inherited socket at which to listen for them."""
    control_path: str | None = None
    """Where to listen for commands of the process's owner."""
    control_fd: int | None = None
    """The number of an inherited socket at which to listen for them."""
    notify_socket: str | None = None
    """The address at which the service manager listens for news of us."""
    socket_mode: int | None = None
    """The mode of sockets that are made; None: 0660 with `socket_group`, else 0600."""
    socket_group: Group | None = None
    """The group of sockets that are made; None: the kernel's choice."""
    require_other_user: bool = False
    """Refuse a back-end of our own user, of the front's user, or of root; otherwise
    there is a warning."""
    log_level: str = "warning"
    sandbox: bool = True
    """Give up the rights that the running process does not need; False to debug it."""
    device: Config = Config()
    """How the device is treated."""

    @property
    def rights(self) -> Rights:
        """The users that may connect to sockets that are made."""
        mode = self.socket_mode
        if mode is None:
            mode = 0o600 if self.socket_group is None else 0o660
        return Rights(mode, self.socket_group)
