# SPDX-License-Identifier: Apache-2.0
"""Moves a guest from one QEMU to another one on this host, and compares their memory.

with Guest(...) as source, Guest(..., source=source) as destination:
    with Migration(source, destination, folder / "migration") as moving:
        ...  # about half of the memory was sent; the guest runs at the source
        moving.send_all()
        ...  # all of it was sent; the guest runs at the source
        moving.finish()
    destination.call(...)

The destination is another process with the same devices, in a folder of its own. It
does not run before its memory has been compared with the source's, in which nothing may
change any more. No request to the agent may be on its way then, but functions may run.
"""

from __future__ import annotations

import mmap
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.guest.machine import Guest
from tests.real.qmp import Json

PAGE = 4096
PIECE = 1 << 20
MEMORY = "/memfd:memory-backend-memfd"
PATIENCE = 120.0
"""Seconds that a migration may take: others may want the processors."""
HELD = 128 << 20
"""The bytes after which a migration is held; guests have more than 200 MiB to send."""
PASSES = 4
"""All memory is sent, and so often what has changed of it, before the guest stops."""
NO_TIME, MUCH_TIME = 1, 60000
"""Milliseconds that QEMU may stop a guest for the last pages."""


OPEN, STEP = b"o", b"s"
"""The test's orders to a gate that holds: let all through, or one piece more."""


class Gate:
    """Stands between two QEMUs, and holds the stream after so many bytes."""

    def __init__(self, path: Path, onward: Path, held: int) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._onward = onward
        self._left = held
        self._holds = threading.Event()
        self._told, self._tell = os.pipe()
        self._thread = threading.Thread(target=self._run, name="gate")
        self._thread.start()

    def wait(self) -> None:
        assert self._holds.wait(PATIENCE), f"{self._left} bytes did not come"

    def open(self) -> None:
        os.write(self._tell, OPEN)

    def step(self) -> None:
        """Let another piece through, and hold the stream again."""
        self._holds.clear()
        os.write(self._tell, STEP)
        self.wait()

    def close(self) -> None:
        """End; both sides have let go, or are cut off."""
        self._listener.shutdown(socket.SHUT_RDWR)
        os.close(self._tell)
        self._thread.join()
        os.close(self._told)
        self._listener.close()

    def _run(self) -> None:
        try:
            source, _ = self._listener.accept()
        except OSError:  # it is shut down
            return
        with source, socket.socket(socket.AF_UNIX) as destination:
            destination.connect(str(self._onward))
            try:
                while self._left and (data := source.recv(min(PIECE, self._left))):
                    destination.sendall(data)
                    self._left -= len(data)
                self._holds.set()
                while (told := os.read(self._told, 1)) == STEP:
                    destination.sendall(source.recv(PIECE, socket.MSG_WAITALL))
                    self._holds.set()
                while told and (data := source.recv(PIECE)):
                    destination.sendall(data)
            except OSError:  # one of them is gone
                return


class Migration:
    """A migration that has begun, and is held in the middle of the guest's memory."""

    def __init__(
        self, source: Guest, destination: Guest, path: Path, held: int = HELD
    ) -> None:
        self.source = source
        self.destination = destination
        onward = path.with_suffix(".onward")
        for each in (path, onward):
            each.unlink(missing_ok=True)
        tell_events(source, destination)
        destination.qmp("migrate-incoming", uri=f"unix:{onward}")
        self._gate = Gate(path, onward, held)
        try:
            self._may_stop(NO_TIME)
            source.qmp("migrate", uri=f"unix:{path}")
            self._gate.wait()
        except BaseException:
            self._give_up()
            raise

    def __enter__(self) -> Migration:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._gate.close()
        else:
            self._give_up()

    def send_all(self) -> None:
        """Let every page be sent once, and hold the stream again. The guest goes on, at
        the source: from now on, a page that is not logged is left behind.
        """
        while self._passes() < 2:
            self._gate.step()

    def finish(self) -> None:
        """Let it end, compare, and let the guest go on at the destination."""
        self._gate.open()
        self.source.wait_until(self._is_over_or_has_passed, PATIENCE)
        self._may_stop(MUCH_TIME)
        for guest in (self.source, self.destination):
            wait_for(guest, "completed")
        hand_over(self.source, self.destination)

    def let_fail(self) -> None:
        """Let the destination refuse what comes. The source may have sent all by then,
        and has to be told to go on.
        """
        self._gate.open()
        self._may_stop(MUCH_TIME)
        assert self.destination.wait(PATIENCE) != 0
        self.source.wait_until(self._has_ended, PATIENCE)
        self.source.qmp("cont")

    def cancel(self) -> None:
        """End it; the guest stays."""
        self.source.qmp("migrate_cancel")
        wait_for(self.source, "cancelled")

    def _give_up(self) -> None:
        """End both guests: neither may let go of the gate by itself."""
        self.source.kill()
        self.destination.kill()
        self._gate.close()

    def _may_stop(self, milliseconds: int) -> None:
        self.source.qmp(
            "migrate-set-parameters", max_bandwidth=0, downtime_limit=milliseconds
        )

    def _has_ended(self) -> bool:
        return self.source.qmp("query-migrate")["status"] in ("completed", "failed")

    def _is_over_or_has_passed(self) -> bool:
        """A guest that finds no time to write anything moves after fewer passes."""
        found: Json = self.source.qmp("query-migrate")
        return passes_of(found) > PASSES or found["status"] not in ("setup", "active")

    def _passes(self) -> int:
        return passes_of(self.source.qmp("query-migrate"))


def passes_of(found: Json) -> int:
    """How many passes through the memory a migration has begun."""
    passes: int = found.get("ram", {}).get("dirty-sync-count", 0)
    return passes


def move_by_file(source: Guest, destination: Guest, path: Path) -> None:
    """Save a guest in a file, and load it at the destination, where it goes on."""
    tell_events(source, destination)
    source.qmp("migrate", uri=f"file:{path}")
    wait_for(source, "completed")
    destination.qmp("migrate-incoming", uri=f"file:{path}")
    wait_for(destination, "completed")
    hand_over(source, destination)


def tell_events(*guests: Guest) -> None:
    """Let QEMU tell of every step of a migration; those of another one are past."""
    events = {"capability": "events", "state": True}
    for guest in guests:
        guest.qmp("migrate-set-capabilities", capabilities=[events])
        guest.qmp.forget()


def hand_over(source: Guest, destination: Guest) -> None:
    """Both have stopped: compare their memory, and let the destination go on."""
    left = differing_pages(source, destination)
    assert not left, f"{len(left)} pages were left behind, at {left[:8]}"
    destination.agent.take_over(source.agent)
    destination.qmp("cont")


def wait_for(guest: Guest, status: str) -> None:
    """Wait until a guest's migration has this status."""
    try:
        guest.qmp.wait_for("MIGRATION", PATIENCE, status=status)
    except AssertionError as error:
        found = guest.qmp("query-migrate")
        raise AssertionError(f"{error}\n{found}\n{guest.describe()}") from None


def differing_pages(one: Guest, two: Guest) -> list[str]:
    """The addresses of pages that are not the same in both, in the memory's file."""
    found = []
    with memory_of(one) as ours, memory_of(two) as theirs:
        for start in range(0, len(ours), PIECE):
            if ours[start : start + PIECE] == theirs[start : start + PIECE]:
                continue
            for page in range(start, start + PIECE, PAGE):
                if ours[page : page + PAGE] != theirs[page : page + PAGE]:
                    found.append(f"{page:#x}")
    return found


@contextmanager
def memory_of(guest: Guest) -> Iterator[mmap.mmap]:
    """A guest's memory, to read."""
    with (
        _memory_file(guest.pid).open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory,
    ):
        yield memory


def _memory_file(pid: int) -> Path:
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # QEMU has others, which come and go
            if os.readlink(path).startswith(MEMORY):
                return path
    raise AssertionError(f"process {pid} has no file with a guest's memory")
