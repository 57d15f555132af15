# SPDX-License-Identifier: Apache-2.0
"""The QEMU Machine Protocol: commands to QEMU's programs, and the events they tell of.

with Qmp.pair() as (ours, theirs):
    start("qemu-system-x86_64", *Qmp.options(theirs.fileno()))
    qmp = Qmp(ours)
    qmp("stop")
    qmp.wait_for("STOP")
"""

import json
import select
import socket
import time
from typing import Any

Json = dict[str, Any]


class QmpError(Exception):
    """A command was refused."""


class Qmp:
    """One monitor. Commands are answered in order; events between are kept."""

    def __init__(self, sock: socket.socket, timeout: float = 30) -> None:
        self._sock = sock
        self._timeout = timeout
        self._received = b""
        self._events: list[Json] = []
        self.seen: list[Json] = []
        """All events, also those that were waited for."""
        assert "QMP" in self._read(timeout)
        self("qmp_capabilities")

    @staticmethod
    def options(fd: int, monitor: str = "-mon") -> tuple[str, ...]:
        """The options that give a QEMU its end of the connection."""
        chardev = "--chardev" if monitor.startswith("--") else "-chardev"
        return (
            *(chardev, f"socket,id=qmp,fd={fd}"),
            *(monitor, "chardev=qmp,mode=control"),
        )

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Return a command's result. '_' in its arguments' names stands for '-'."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        request = {"execute": command, "arguments": named}
        self._sock.sendall(json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + self._timeout
        while True:
            message = self._read(deadline - time.monotonic())
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise QmpError(f"{command} {named}: {message['error']['desc']}")
            self._note(message)

    def wait_for(self, event: str, timeout: float | None = None, **data: Any) -> Json:
        """The data of the next event of this name, and with these data in it."""
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        wanted = data.items()
        while True:
            for i, message in enumerate(self._events):
                found: Json = message.get("data", {})
                if message["event"] == event and wanted <= found.items():
                    del self._events[: i + 1]
                    return found
            try:
                self._note(self._read(deadline - time.monotonic()))
            except TimeoutError:
                seen = [message["event"] for message in self.seen]
                raise AssertionError(f"no {event} {data}; there were {seen}") from None

    def forget(self) -> None:
        """Wait for none of the events so far."""
        self._events.clear()

    def close(self) -> None:
        self._sock.close()

    def _note(self, message: Json) -> None:
        self._events.append(message)
        self.seen.append(message)

    def _read(self, timeout: float) -> Json:
        deadline = time.monotonic() + timeout
        while b"\n" not in self._received:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._sock], [], [], left)[0]:
                raise TimeoutError("nothing came from the monitor")
            part = self._sock.recv(1 << 16)
            if not part:
                raise ConnectionError("the monitor is gone")
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        message: Json = json.loads(line)
        return message
