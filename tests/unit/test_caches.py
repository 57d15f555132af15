# SPDX-License-Identifier: Apache-2.0
"""How much processors' caches hold, by a sysfs that is made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhost_airlock.proxy.caches import LEAST, MIB, cached_bytes


def make(root: Path, *caches: tuple[str, str]) -> str:
    for number, (level, size) in enumerate(caches):
        index = root / f"index{number}"
        index.mkdir()
        (index / "level").write_text(f"{level}\n")
        (index / "size").write_text(f"{size}\n")
    return str(root)


@pytest.mark.parametrize(
    ("size", "expected"),
    [("512K", 4 * MIB), ("2048K", 4 * MIB), ("4096K", 8 * MIB), ("16M", 32 * MIB)],
)
def test_it_is_the_second_level_of_two_processors(tmp_path, size, expected):
    root = make(tmp_path, ("1", "32K"), ("1", "32K"), ("2", size), ("3", "300M"))
    assert cached_bytes(root) == expected


@pytest.mark.parametrize("size", ["", "K", "4096", "4096X", "-1M", "much", "4\xe9M"])
def test_a_size_that_says_nothing(tmp_path, size):
    root = make(tmp_path, ("1", "32K"), ("2", size))
    assert cached_bytes(root) == LEAST


def test_without_a_second_level_or_without_sysfs(tmp_path):
    assert cached_bytes(str(tmp_path / "none")) == LEAST
    assert cached_bytes(make(tmp_path, ("1", "32K"))) == LEAST


def test_this_machine():
    assert cached_bytes() >= LEAST
