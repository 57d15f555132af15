# SPDX-License-Identifier: Apache-2.0
"""Programs of other users than the tests': only root can start them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"


def as_user(number: int, *groups: int) -> list[str]:
    """What is put before a command, so that it runs as this user.

    The user's own group has the same number.
    """
    others = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    return ["setpriv", f"--reuid={number}", f"--regid={number}", others]


def python() -> list[str]:
    """A Python with our package that every user can run: not one in a home folder.

    Where there is none, the test is skipped.
    """
    if os.geteuid() != 0:
        pytest.skip("only root can start programs of other users")
    name = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    for each in (sys.executable, name):
        if Path(each).exists() and open_to_all(Path(each), SOURCE):
            return ["/usr/bin/env", f"PYTHONPATH={SOURCE}", each]
    pytest.skip(f"no Python that other users can run: {sys.executable}, {name}")


def open_to_all(*files: Path) -> bool:
    """Can every user get at these files?"""
    folders = {folder for file in files for folder in file.resolve().parents}
    return all(folder.stat().st_mode & 0o001 for folder in folders)
