# SPDX-License-Identifier: Apache-2.0
"""The VMM's part in dirty logging: a log in a file, out of which bits are taken."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from vhost_airlock.dataplane.mapping import Mapping
from vhost_airlock.vhost.wire import Log

SOURCE = Path(__file__).with_name("dirty.c")
PAGE = 4096


@cache
def library() -> ctypes.CDLL:
    """The compiled dirty.c."""
    # The library that tools/test-asan preloads is for Python.
    clean = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "dirty.so")
        command = ["cc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC"]
        subprocess.run([*command, SOURCE, "-o", made], check=True, env=clean)
        loaded = ctypes.CDLL(str(made))
    loaded.take.restype = ctypes.c_size_t
    loaded.hammer.restype = ctypes.c_uint64
    return loaded


def pages_of(ranges: Iterable[tuple[int, int]]) -> set[int]:
    """The numbers of all pages that these (address, bytes) touch."""
    return {
        page
        for address, size in ranges
        if size
        for page in range(address // PAGE, (address + size - 1) // PAGE + 1)
    }


class LogFile:
    """A log of `size` bytes, `offset` bytes from the beginning of its file, between
    bytes that nobody may touch."""

    CANARY = b"\x5a"

    def __init__(self, size: int, offset: int = 0) -> None:
        self.told = Log(size, offset)
        self.fd = os.memfd_create("log", os.MFD_CLOEXEC)
        self._end = offset + size
        whole = -(-self._end // PAGE) * PAGE + PAGE
        os.ftruncate(self.fd, whole)
        self._view = mmap.mmap(self.fd, whole)
        self._view[:offset] = self.CANARY * offset
        self._view[self._end :] = self.CANARY * (whole - self._end)
        self._pages = (ctypes.c_uint64 * min(8 * size, 1 << 16))()
        self._mapping: Mapping | None = None

    @classmethod
    def up_to(cls, address: int, offset: int = 0) -> LogFile:
        """One for the memory below this guest-physical address."""
        return cls((address - 1) // PAGE // 8 + 1, offset)

    @property
    def place(self) -> tuple[int, int]:
        """Where the data plane sees it, and its size."""
        if self._mapping is None:
            self._mapping = Mapping(self.fd, self.told.size, self.told.offset)
        return self._mapping.address, self.told.size

    @property
    def bits(self) -> memoryview:
        """The log itself."""
        return memoryview(self._view)[self.told.offset : self._end]

    def take(self) -> set[int]:
        """Take all bits out; the numbers of their pages. Others may set some."""
        size, room = self.told.size, len(self._pages)
        log = (ctypes.c_char * size).from_buffer(self._view, self.told.offset)
        found = library().take(
            log, ctypes.c_size_t(size), self._pages, ctypes.c_size_t(room)
        )
        del log  # or the file can't be unmapped
        assert found <= room, f"{found} bits, more than are expected"
        return set(self._pages[:found])

    @contextlib.contextmanager
    def hammered(self, pages: Iterable[int]) -> Iterator[None]:
        """In this context, another device toggles the bits of these pages, which lie in
        the first 256 bytes, as fast as it can; in the end none may have been lost.
        """
        mask = bytearray(256)
        for page in pages:
            mask[page // 8] |= 1 << page % 8
        stop, lost = ctypes.c_int(0), list[int]()

        def run() -> None:
            log = (ctypes.c_char * 256).from_buffer(self._view, self.told.offset)
            size = ctypes.c_size_t(256)
            lost.append(library().hammer(log, size, bytes(mask), ctypes.byref(stop)))

        thread = threading.Thread(target=run, name="another device")
        thread.start()
        try:
            yield
        finally:
            stop.value = 1
            thread.join()
        assert lost == [0], "bits of another device were lost"

    def intact(self) -> bool:
        """Were the bytes around it left alone?"""
        around = self._view[: self.told.offset] + self._view[self._end :]
        return around == self.CANARY * len(around)

    def cut(self) -> None:
        """The file is empty: to touch the log is a SIGBUS."""
        os.ftruncate(self.fd, 0)

    def close(self) -> None:
        if self._mapping is not None:
            self._mapping.close()
        self._view.close()
        os.close(self.fd)
