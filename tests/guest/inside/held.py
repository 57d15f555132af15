# SPDX-License-Identifier: Apache-2.0
"""Things that a guest holds on to in a file system while something happens to it: open
files, one of them unlinked, a lock, and a copy that runs.
"""

import fcntl
import os
import subprocess
from pathlib import Path
from typing import IO

LENGTH = 4096


class Held:
    """Open files in a folder, and the copy of its file "source" to "copy"."""

    def __init__(self, folder: Path, *, unlinked: bool) -> None:
        self.folder = folder
        self.files: list[IO[bytes]] = []
        for name in ("open", "renamed", "locked", "unlinked"):
            if name != "unlinked" or unlinked:
                self.files.append(folder.joinpath(name).open("w+b", buffering=0))
        folder.joinpath("renamed").rename(folder / "another name")
        if unlinked:
            folder.joinpath("unlinked").unlink()
        fcntl.lockf(self.files[2], fcntl.LOCK_EX)
        self.turns = 0
        self.copy = subprocess.Popen(
            ["dd", f"if={folder}/source", f"of={folder}/copy", "bs=65536"],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def use(self) -> None:
        """Read what was written, and write more, in each of the files."""
        for number, file in enumerate(self.files):
            file.seek(0)
            for turn in range(self.turns):
                if file.read(LENGTH) != content(number, turn):
                    raise ValueError(f"file {number} lacks what turn {turn} wrote")
            file.write(content(number, self.turns))
            os.fsync(file.fileno())
        self.turns += 1
        if lockable(self.folder / "locked"):
            raise ValueError("the lock is gone")


def content(number: int, turn: int) -> bytes:
    """The bytes that a turn writes to a file."""
    return f"{number:03} {turn:03}\n".encode() * (LENGTH // 8)


def lockable(path: Path) -> bool:
    """Could another process lock this file?"""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with path.open("r+b") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


_held: list[Held] = []


def begin(folder: str, unlinked: bool) -> None:
    """Open the files, lock one of them, and start the copy."""
    _held.append(Held(Path(folder), unlinked=unlinked))
    _held[0].use()


def use() -> bool:
    """Use the files; returns whether the copy still runs."""
    _held[0].use()
    return _held[0].copy.poll() is None


def end() -> int:
    """Wait for the end of the copy, and close the files; returns dd's status."""
    held = _held.pop()
    held.use()
    status = held.copy.wait()
    for file in held.files:
        file.close()
    return status
