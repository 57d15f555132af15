# SPDX-License-Identifier: Apache-2.0
"""Answers each connection with the state of the airlock: one JSON document.

The main thread may be waiting for its back, up to the time-out, just when an operator
wants to look. So this is a thread of its own. It only reads: counters that the workers
write are read word by word while they run, and no object of the control plane is
changed. No other thread ever waits for it.

The socket has packets. So a reader that connects to the VMM's socket, or a back-end's,
by mistake, is refused by the kernel: those are streams, and their servers notice
nothing of it. A VMM that connects here is refused likewise.

Readers are answered one at a time, and have READ_TIME to read: a slow reader can only
make the next one wait for this time. Readers that the broker has accepted, at the
control socket, are handed over at another socket.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Self

from .. import __version__
from ..vhost.fds import eventfd, notify
from .signals import ENDING
from .sockets import ListeningSocket

KIND = socket.SOCK_SEQPACKET
"""Of the socket."""
READ_TIME = 1.0
"""Seconds that a reader has. Nearly every document fits into a socket's buffer."""
PACKET = 32 << 10
"""Bytes at most in a packet: any socket's buffer has room for it."""
PAUSE = 0.1
"""Seconds until the next try, when there is no descriptor left for a reader."""


class Stats:
    """Answers readers that connect to a listener, or that are handed over; both sockets
    are closed in close().

    Readers are answered from start() on, by a thread that calls `describe` for each.
    It has the sandbox of the thread that starts it.
    """

    def __init__(
        self,
        listener: ListeningSocket | None,
        describe: Callable[[], dict[str, object]],
        handed: socket.socket | None = None,
    ) -> None:
        self._describe = describe
        self._started = time.monotonic()
        self._version = __version__
        self._pid = os.getpid()
        self.listener = listener
        self.handed = handed
        self._stop = eventfd()
        self._thread = threading.Thread(
            target=self._serve, name="airlock-stats", daemon=True
        )

    def start(self) -> Self:
        self._thread.start()
        return self

    def document(self) -> dict[str, object]:
        return {
            "version": self._version,
            "pid": self._pid,
            "uptime": round(time.monotonic() - self._started, 6),
            **self._describe(),
        }

    def stop(self) -> None:
        """Answer no more: nothing that `describe` tells of is used from then on."""
        if self._thread.is_alive():
            notify(self._stop)
            self._thread.join()

    def close(self) -> None:
        """Stop, and stop listening."""
        self.stop()
        self._stop.close()
        for sock in (self.listener, self.handed):
            if sock is not None:
                sock.close()

    def _serve(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        stopped = select.poll()
        stopped.register(self._stop.fileno(), select.POLLIN)
        poll = select.poll()
        poll.register(self._stop.fileno(), select.POLLIN)
        ways = {}
        if self.listener is not None:
            ways[self.listener.fileno()] = self.listener.accept
        if self.handed is not None:
            ways[self.handed.fileno()] = self._take
        for fd in ways:
            poll.register(fd, select.POLLIN)
        while self._stop.fileno() not in (ready := {fd for fd, _ in poll.poll()}):
            for fd in ready:
                try:
                    with ways[fd]() as reader:
                        self._answer(reader)
                except BrokenPipeError:  # the broker is gone
                    poll.unregister(fd)
                except OSError:
                    stopped.poll(PAUSE * 1000)

    def _take(self) -> socket.socket:
        """Return a reader that is handed over. OSError: there is none; BrokenPipeError:
        there will be none any more.
        """
        assert self.handed is not None
        data, fds, _, _ = socket.recv_fds(self.handed, 16, 1, socket.MSG_CMSG_CLOEXEC)
        if not data:
            raise BrokenPipeError
        if not fds:
            raise OSError("there is no descriptor left for a reader")
        return socket.socket(fileno=fds[0])

    def _answer(self, reader: socket.socket) -> None:
        data = json.dumps(self.document()).encode() + b"\n"
        until = time.monotonic() + READ_TIME
        with contextlib.suppress(OSError):  # gone, or too slow
            for start in range(0, len(data), PACKET):
                reader.settimeout(max(0.001, until - time.monotonic()))
                reader.send(data[start : start + PACKET])
