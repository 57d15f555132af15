# SPDX-License-Identifier: Apache-2.0
"""Talk to what runs in a machine: lines of JSON through a serial port."""

import json
import select
import socket
import time
from typing import Any


class Lines:
    """A connected socket, whose other end is a character device of QEMU's."""

    def __init__(self, ours: socket.socket) -> None:
        self.ours = ours
        self._received = b""

    def close(self) -> None:
        self.ours.close()

    def take_over(self, other: "Lines") -> None:
        """Go on here with what the other end has said there, for it is silent now."""
        self._received = other._received
        while select.select([other.ours], [], [], 0)[0]:
            data = other.ours.recv(1 << 16)
            if not data:
                break
            self._received += data

    def send(self, message: object) -> None:
        self.ours.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float) -> Any:
        """The next message. Raises EOFError or TimeoutError when there is none."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._received:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self.ours], [], [], left)[0]:
                raise TimeoutError(f"no answer in {timeout} s")
            data = self.ours.recv(1 << 16)
            if not data:
                raise EOFError("the other end is gone")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)
