# SPDX-License-Identifier: Apache-2.0
"""qemu-storage-daemon as a vhost-user-blk back-end."""

import functools
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.real.processes import Process
from tests.real.programs import Programs
from tests.real.qmp import Qmp


@dataclass(frozen=True)
class Disk:
    """The export: a raw file, or without a file a null device of `size` bytes."""

    image: Path | None = None
    size: int = 0
    queues: int = 1
    direct: bool = False
    """The file is opened with O_DIRECT, so that alignment matters."""
    aio: str = "threads"
    locking: str = "auto"

    def blockdev(self) -> str:
        if self.image is None:
            return f"driver=null-co,node-name=disk,size={self.size},read-zeroes=on"
        cache = "on" if self.direct else "off"
        return (
            f"driver=file,node-name=disk,filename={self.image},"
            f"cache.direct={cache},discard=unmap,aio={self.aio},"
            f"locking={self.locking}"
        )


class StorageDaemon(Process):
    """A running daemon that serves a disk at a listening socket."""

    def __init__(
        self, programs: Programs, disk: Disk, listener: int, log: Path
    ) -> None:
        self._monitor, theirs = socket.socketpair()
        with theirs:
            argv = programs(
                "qemu-storage-daemon",
                *Qmp.options(theirs.fileno(), "--monitor"),
                *("--object", "iothread,id=io"),
                *("--blockdev", disk.blockdev()),
                "--export",
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,iothread=io,"
                f"num-queues={disk.queues},addr.type=fd,addr.str={listener}",
            )
            super().__init__(argv, log, pass_fds=[listener, theirs.fileno()])

    @functools.cached_property
    def qmp(self) -> Qmp:
        return Qmp(self._monitor)

    def kill(self) -> None:
        super().kill()
        self._monitor.close()


def start_daemon(programs: Programs, disk: Disk, path: Path) -> StorageDaemon:
    """Start one that serves a new socket at this path."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        log = path.with_suffix(".storage.log")
        return StorageDaemon(programs, disk, listener.fileno(), log)


@contextmanager
def storage_daemon(
    programs: Programs, disk: Disk, path: Path
) -> Iterator[tuple[StorageDaemon, Path]]:
    """A running daemon and the socket that it serves.

    It gets the listening socket from us, so there is nothing to wait for. At the end it
    must still be alive, and end as told: a front-end that leaves a mess kills it.
    """
    with start_daemon(programs, disk, path) as daemon:
        yield daemon, path
        assert not daemon.ended(), daemon.describe()
        assert daemon.stop() == 0, daemon.describe()
