# SPDX-License-Identifier: Apache-2.0
"""A network of the test's own, so that nothing that it does there is seen outside."""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.real.processes import run
from tests.real.programs import Programs

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class Network:
    """A network namespace. Sockets made and programs started in it stay in it."""

    def __init__(self, programs: Programs, folder: Path) -> None:
        thread = threading.Thread(target=self._create)
        thread.start()
        thread.join()
        with self.entered():
            # All groups may use ICMP sockets, as passt does for pings.
            Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 2147483647")
            up = programs("busybox", "ip", "link", "set", "lo", "up")
            run(up, folder / "network.log")

    def _create(self) -> None:
        _check(_libc.unshare(CLONE_NEWNET))
        self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is in it meanwhile."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(_libc.setns(self.fd, CLONE_NEWNET))
            yield
        finally:
            _check(_libc.setns(before, CLONE_NEWNET))
            os.close(before)

    def close(self) -> None:
        os.close(self.fd)


def _check(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
