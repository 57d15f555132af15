# SPDX-License-Identifier: Apache-2.0
"""The airlocks that `vhost-airlock qemu` starts: found, and awaited."""

from __future__ import annotations

import os
import select
from pathlib import Path

from tests.support.backs import PATIENCE, wait_until


class Airlocks:
    """All that have a back-end in this folder. Their own folders are in it too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = f"TMPDIR={folder}"
        """For the command, so that it is so."""

    def pids(self) -> dict[str, int]:
        """Their process numbers by their names."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            words = _words(process)
            above = _words(_parent(process))  # an airlock's, if this is its broker
            if self._is_airlock(words) and not self._is_airlock(above):
                (name,) = (word for word in words if word.startswith("--name="))
                found[name.removeprefix("--name=")] = int(process.name)
        return found

    def private(self) -> list[Path]:
        """The folders with their sockets."""
        return [path for path in self.folder.glob("vhost-airlock-*") if path.is_dir()]

    def keeper(self) -> int:
        """A descriptor of the process that ends when all is tidied up."""
        wait_until(lambda: self.pids() != {}, "an airlock starts")
        pid = min(self.pids().values())
        return os.pidfd_open(int(_parent(Path(f"/proc/{pid}")).name))

    def assert_end(self, keeper: int) -> None:
        """Wait until all have ended; nothing may be left of them."""
        with os.fdopen(keeper) as end:
            assert select.select([end], [], [], PATIENCE)[0], self.pids()
        assert self.pids() == {}
        assert self.private() == []

    def _is_airlock(self, words: list[str]) -> bool:
        """Is this the command of an airlock of ours, or its broker's?"""
        ours = any(f"={self.folder}/" in word for word in words)
        return words[3:5] == ["vhost_airlock", "run"] and ours


def _words(process: Path) -> list[str]:
    try:
        return process.joinpath("cmdline").read_text().split("\0")
    except OSError:  # it has ended
        return []


def _parent(process: Path) -> Path:
    try:
        stat = process.joinpath("stat").read_text()
    except OSError:
        return process
    return process.with_name(stat.rpartition(")")[2].split()[1])
