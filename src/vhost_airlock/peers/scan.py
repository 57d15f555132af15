# SPDX-License-Identifier: Apache-2.0
"""Searches the memory and descriptors of a process for given bytes.

This proves the isolation: plant a random marker in guest memory, and search everything
that the back-end's process can reach without another process. That is its mappings; the
files behind them, whole, since a process can widen a mapping to the rest of its file;
and its open descriptors, since it can map those.

The search takes the right to trace the process (an ancestor has it, and root). Only
root can open the files behind mappings; others search the mapped parts.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CHUNK = 4 << 20


@dataclass(frozen=True, slots=True)
class Holding:
    """One descriptor or mapping of a process."""

    kind: str
    """'fd' or 'mapping'."""
    place: str
    """The descriptor's number, or the mapping's addresses as in /proc/PID/maps."""
    name: str
    """The kernel's name for its file: a path, 'memfd:ram', '' for anonymous memory."""
    size: int
    """Bytes of the mapping, or of the file behind the descriptor; 0 for sockets etc."""
    inode: tuple[int, int] | None
    """Device and number of the file; None where there is none to search."""
    readable: bool = True
    shared: bool = False

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.place} {self.name or 'anonymous'} ({self.size} bytes)"
        )


@dataclass(frozen=True, slots=True)
class Found:
    """A marker, the holding in which it was found, and the file offset or address."""

    marker: bytes
    holding: Holding
    at: int


@dataclass(frozen=True, slots=True)
class Scan:
    """The outcome of a search."""

    found: tuple[Found, ...]
    searched: int
    """The number of bytes that were searched, without holes in files."""
    unreadable: tuple[Holding, ...]
    """Holdings that the kernel did not let us read, its own pages ([vvar]) among them.
    """


def descriptors(pid: int) -> list[Holding]:
    """The open descriptors of a process."""
    found = []
    for link in sorted(
        Path(f"/proc/{pid}/fd").iterdir(), key=lambda path: int(path.name)
    ):
        try:
            name, info = os.readlink(link), link.stat()
        except FileNotFoundError:
            continue  # closed meanwhile
        regular = stat.S_ISREG(info.st_mode)
        inode = (info.st_dev, info.st_ino) if regular else None
        size = info.st_size if regular else 0
        found.append(Holding("fd", link.name, _plain(name), size, inode, shared=True))
    return found


def mappings(pid: int) -> list[Holding]:
    """The memory mappings of a process."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        place, mode, _, device, number, *name = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in place.split("-"))
        major, minor = (int(part, 16) for part in device.split(":"))
        inode = (os.makedev(major, minor), int(number)) if int(number) else None
        found.append(
            Holding(
                "mapping",
                place,
                _plain("".join(name)),
                end - start,
                inode,
                readable="r" in mode,
                shared="s" in mode,
            )
        )
    return found


def search(pid: int, markers: Sequence[bytes]) -> Scan:
    """Look for markers in everything that a process holds.

    Each file is searched once, at the first holding of it. Anonymous mappings without
    read permission are empty reservations, and left out.
    """
    found: list[Found] = []
    unreadable: list[Holding] = []
    files: set[tuple[int, int]] = set()
    searched = 0
    overlap = max(map(len, markers)) - 1
    for holding in [*descriptors(pid), *mappings(pid)]:
        start, data = 0, b""
        try:
            for at, piece in _pieces(pid, holding, files):
                adjacent = at == start + len(data)
                kept = data[len(data) - overlap :] if adjacent and overlap else b""
                start, data = at - len(kept), kept + piece
                searched += len(piece)
                found += [
                    Found(marker, holding, start + match.start())
                    for marker in markers
                    for match in re.finditer(re.escape(marker), data)
                ]
        except OSError:
            unreadable.append(holding)
    return Scan(tuple(found), searched, tuple(unreadable))


def _plain(name: str) -> str:
    return (
        name.removeprefix("/").removesuffix(" (deleted)") if "memfd:" in name else name
    )


def _pieces(
    pid: int, holding: Holding, files: set[tuple[int, int]]
) -> Iterator[tuple[int, bytes]]:
    """Yield the bytes that a holding gives access to, with file offset or address."""
    path = f"/proc/{pid}/fd/{holding.place}"
    part = None
    if holding.kind == "mapping":
        start, end = (int(side, 16) for side in holding.place.split("-"))
        part = range(start, end)
        path = f"/proc/{pid}/map_files/{start:x}-{end:x}"  # maps has leading zeros
    if holding.inode is not None and holding.inode not in files:
        try:
            if stat.S_ISREG(os.stat(path).st_mode):
                yield from _read(path, None)
                files.add(holding.inode)
        except PermissionError:
            if part is None:
                raise
    searched = holding.shared and holding.inode in files
    if part is not None and holding.readable and not searched:
        yield from _read(f"/proc/{pid}/mem", part)


def _read(path: str, part: range | None) -> Iterator[tuple[int, bytes]]:
    """Yield the bytes of a part of a file, or of all of it but its holes."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for piece in _data_parts(file) if part is None else [part]:
            at = piece.start
            while chunk := os.pread(file, min(CHUNK, piece.stop - at), at):
                yield at, chunk
                at += len(chunk)
    finally:
        os.close(file)


def _data_parts(file: int) -> Iterator[range]:
    """Yield the parts of a file that are no holes."""
    at = 0
    while True:
        try:
            at = os.lseek(file, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return
            raise
        hole = os.lseek(file, at, os.SEEK_HOLE)
        yield range(at, hole)
        at = hole
