# SPDX-License-Identifier: Apache-2.0
"""A guest's work on a shared file system; the host does the same elsewhere."""

import hashlib
import mmap
import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.guest.inside.noise import PIECE, data, difference, pieces

SIZES = (0, 1, 511, 4095, 4096, 4097, 65536, 131073, 3 * PIECE + 5)
BLOCK = 4096
EPOCH = 10**9
"""Files with a time before this have it from us."""


def build(folder: str) -> None:
    """Make a tree by all that a file system can do."""
    root = Path(folder)
    for seed, size in enumerate(SIZES):
        root.joinpath(f"of {size}").write_bytes(data(seed, size))
    for i in range(100):
        path = root / f"d{i % 10}" / "ü" / str(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{i}\n" * i)

    root.joinpath("d0/ü/0").rename(root / "renamed")
    root.joinpath("d0/ü/10").replace(root / "d1/ü/1")
    root.joinpath("d2").rename(root / "d3/moved")
    root.joinpath("d4/ü/4").unlink()
    for i in range(5, 96, 10):
        root.joinpath(f"d5/ü/{i}").unlink()
    root.joinpath("d5/ü").rmdir()

    root.joinpath("hard link").hardlink_to(root / "of 4097")
    root.joinpath("link").symlink_to("of 4097")
    root.joinpath("link to nothing").symlink_to("x" * 200)
    root.joinpath("d6/ü/6").chmod(0o640)
    root.joinpath("d7").chmod(0o1711)
    os.utime(root / "d6/ü/16", ns=(EPOCH * 10**9 - 2, EPOCH * 10**9 - 1))
    os.mkfifo(root / "fifo", 0o600)

    os.truncate(root / "of 131073", 70000)
    os.truncate(root / "of 511", 9999)
    with root.joinpath("of 4096").open("ab") as file:
        for i in range(50):
            file.write(b"%d\n" % i)
            file.flush()
    with root.joinpath("hole").open("wb") as file:
        file.seek(5 * PIECE)
        file.write(b"end")
        os.posix_fallocate(file.fileno(), 0, 2 * BLOCK)
        os.fsync(file.fileno())
    with root.joinpath("of 65536").open("r+b") as file:
        os.pwrite(file.fileno(), b"middle", 30000)
        os.fdatasync(file.fileno())
    with root.joinpath("unlinked").open("w+b") as file:
        root.joinpath("unlinked").unlink()
        file.write(b"still there")
        file.seek(0)
        if file.read() != b"still there":
            raise ValueError("an unlinked file does not keep what is written")


def survey(folder: str) -> dict[str, list[str | int]]:
    """All that is in a folder: kind and mode, links, size and content, set times."""
    found: dict[str, list[str | int]] = {}
    for path in sorted(Path(folder).rglob("*")):
        status = path.lstat()
        content = ""
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            content += f" {status.st_size}"
            if status.st_mtime < EPOCH:
                content += f" {status.st_mtime_ns}"
        name = str(path.relative_to(folder))
        links = 1 if path.is_dir() else status.st_nlink
        found[name] = [stat.filemode(status.st_mode), links, content]
    return found


def write_big(path: str, seed: int, size: int) -> None:
    with open(path, "wb") as file:
        for piece in pieces(seed, size):
            file.write(piece)
        os.fsync(file.fileno())


def check_big(path: str, seed: int, size: int) -> None:
    """Is it what write_big() writes? The guest's cache must not answer that."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for piece in pieces(seed, size):
            found = file.read(len(piece))
            if found != piece:
                raise ValueError(f"{path} {difference(piece, found)}")
        if file.read(1):
            raise ValueError(f"{path} is longer than {size}")


def map_file(path: str, seed: int, size: int) -> None:
    """Change every other page of a file through a shared mapping."""
    write_big(path, seed, size)
    new = mapped(seed, size)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), size) as memory:
        if memory[:] != data(seed, size):
            raise ValueError("the mapping has not what was written")
        for start in range(0, size, 2 * BLOCK):
            memory[start : start + BLOCK] = new[start : start + BLOCK]
        memory.flush()


def mapped(seed: int, size: int) -> bytes:
    """The content that map_file() leaves."""
    content = bytearray(data(seed, size))
    new = data(seed + 1, size)
    for start in range(0, size, 2 * BLOCK):
        content[start : start + BLOCK] = new[start : start + BLOCK]
    return bytes(content)


def direct(path: str, seed: int, size: int) -> None:
    """Write and read past all caches, at addresses which are no multiple of a page."""
    content = data(seed, size)
    with mmap.mmap(-1, size + BLOCK) as memory:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644)
        try:
            for shift in (0, 512, 3584):
                with memoryview(memory)[shift : shift + size] as view:
                    view[:] = content
                    if os.pwritev(fd, [view[:BLOCK], view[BLOCK:]], 0) != size:
                        raise ValueError("a short write")
                    view[:] = bytes(size)
                    if os.preadv(fd, [view], 0) != size or view != content:
                        raise ValueError(f"shift {shift}: {difference(content, view)}")
        finally:
            os.close(fd)


def crowd(folder: str, threads: int, rounds: int) -> None:
    """Many threads, each with files of its own, start their operations together."""
    start = threading.Barrier(threads)

    def one(number: int) -> None:
        content = crowd_content(number)
        start.wait()
        for i in range(rounds):
            path = Path(folder, f"{number}.{i}")
            path.write_bytes(content)
            path.rename(path.with_suffix(".new"))
            found = path.with_suffix(".new").read_bytes()
            if found != content:
                raise ValueError(f"{path} {difference(content, found)}")
            if i + 1 < rounds:
                path.with_suffix(".new").unlink()

    in_threads(one, threads)


def crowd_content(number: int) -> bytes:
    return data(number % 7, 20000 + number)


def in_threads(function: Callable[[int], None], count: int) -> None:
    """Call it with each number at the same time; raise what any of them raises."""
    with ThreadPoolExecutor(count) as pool:
        for _ in pool.map(function, range(count)):
            pass


_held: list[int] = []
"""Descriptors of files that stay open."""


def hold(folder: str, unlinked: bool) -> None:
    """Open files and leave them open: one with a name, one that was renamed since, a
    folder, and one without any name any more.
    """
    root = Path(folder)
    for number, name in enumerate(("named", "before", "unlinked")):
        if name != "unlinked" or unlinked:
            fd = os.open(root / name, os.O_RDWR | os.O_CREAT)
            os.write(fd, data(number, PIECE))
            _held.append(fd)
    root.joinpath("before").rename(root / "renamed")
    if unlinked:
        root.joinpath("unlinked").unlink()


def let_go() -> None:
    """Close the last one of them: that without a name, if there was one."""
    os.close(_held.pop())


def check_held() -> None:
    """Are they as they were? Past the guest's cache. And they can still be written."""
    for number, fd in enumerate(_held):
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        found = os.pread(fd, 2 * PIECE, 0)
        if found[:PIECE] != data(number, PIECE):
            raise ValueError(f"{number}: {difference(data(number, PIECE), found)}")
        os.pwrite(fd, b"more", os.fstat(fd).st_size)
