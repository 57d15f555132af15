# SPDX-License-Identifier: Apache-2.0
"""`vhost-airlock run` as a process of its own, and what it holds."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.support.backs import PATIENCE, RecordedBack
from tests.support.profiles import SANITIZED
from vhost_airlock.process.sockets import Listener
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import Fd, eventfd, notify

COMMAND = (sys.executable, "-m", "vhost_airlock", "run")
LINE = "vhost-airlock front.sock"
"""Begins every line of the log of an airlock with --socket-path=.../front.sock."""
LOOKED_INTO = () if os.geteuid() == 0 else ("--sandbox=off",)
"""Options of an airlock whose holdings are asked for: none but root may otherwise."""

UNBOXED = ("--sandbox=off",) if SANITIZED else ()
"""Options of an airlock whose sanitizer looks at /proc, and that writes its counts."""


@dataclass(frozen=True)
class Holdings:
    """The resources of a process that may leak."""

    fds: int
    threads: int
    children: int
    mappings: int
    """Of guest memory and of isolated memory."""
    isolated: int
    """Bytes that all its isolated memory takes."""
    heap: int
    """Bytes of memory of its own, that is anonymous memory."""

    @classmethod
    def of(cls, pid: int) -> Self:
        folder = Path(f"/proc/{pid}")
        status = folder.joinpath("status").read_text()
        files = [os.stat(fd) for fd in folder.joinpath("fd").iterdir()]
        names = [os.readlink(fd) for fd in folder.joinpath("fd").iterdir()]
        maps = folder.joinpath("maps").read_text()
        children = folder.joinpath(f"task/{pid}/children").read_text()
        return cls(
            fds=len(files),
            threads=_field(status, "Threads"),
            children=len(children.split()),
            mappings=maps.count("vhost-airlock-") + maps.count("guest-ram"),
            isolated=sum(
                file.st_blocks * 512
                for file, name in zip(files, names, strict=True)
                if "vhost-airlock-" in name
            ),
            heap=_field(status, "RssAnon") << 10,
        )


def _field(status: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)
    assert found is not None
    return int(found[1])


class Program:
    """The process. Its stderr is in `errors()` and `everything()`."""

    def __init__(
        self, *arguments: str, pass_fds: Sequence[int] = (), command: Sequence[str] = ()
    ) -> None:
        self._log = Fd(os.memfd_create("log", os.MFD_CLOEXEC))
        self.process = subprocess.Popen(
            [*(command or COMMAND), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._log.fileno(),
            stderr=self._log.fileno(),
            pass_fds=pass_fds,
        )
        self._end = os.pidfd_open(self.process.pid)

    @property
    def pid(self) -> int:
        return self.process.pid

    def errors(self) -> str:
        """Its stderr, but for the warning of one user, which all processes here are."""
        return re.sub(r".*: isolated in vain, .*\n", "", self.everything())

    def everything(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode()

    def ended(self, timeout: float = 0) -> bool:
        return bool(select.select([self._end], [], [], timeout)[0])

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit status, when it has ended by itself."""
        assert self.ended(timeout), f"it goes on; it said: {self.errors()}"
        return self.process.wait()

    def stop(self, number: int = signal.SIGTERM, timeout: float = PATIENCE) -> int:
        """Tell it to end; its exit status."""
        self.process.send_signal(number)
        return self.wait(timeout)

    def connect(self, path: Path) -> Channel:
        """Connect to where it is about to listen."""
        return Channel(connect(path, self), peer="airlock")

    def holdings(self) -> Holdings:
        return Holdings.of(self.pid)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._end)
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def connect(
    path: Path, program: Program, kind: int = socket.SOCK_STREAM
) -> socket.socket:
    """There is no event for a socket that somebody else makes."""
    sock = socket.socket(socket.AF_UNIX, kind)
    while True:
        try:
            sock.connect(str(path))
            return sock
        except OSError:
            if program.ended(0.005):
                sock.close()
                raise AssertionError(f"it has ended: {program.errors()}") from None


@contextmanager
def listening(back: RecordedBack, path: Path) -> Iterator[Path]:
    """Let a back-end of this process be connected to, one front-end after the other."""
    listener, end = Listener(str(path)), eventfd()

    def accept() -> None:
        poll = select.poll()
        poll.register(listener.fileno(), select.POLLIN)
        poll.register(end.fileno(), select.POLLIN)
        while end.fileno() not in {fd for fd, _ in poll.poll()}:
            back.start(listener.accept())

    thread = threading.Thread(target=accept, name="listen")
    thread.start()
    try:
        yield path
    finally:
        notify(end)
        thread.join()
        end.close()
        listener.close()
        back.close()
