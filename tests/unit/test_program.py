# SPDX-License-Identifier: Apache-2.0
"""Programs that can't be started: the words for it, before the start and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vhost_airlock.process.program import Program, unusable


def file(path: Path, text: str, mode: int = 0o755) -> None:
    path.write_text(text)
    path.chmod(mode)


def not_executable(path: Path) -> str:
    file(path, "#!/bin/sh\n", 0o644)
    return f"{path} is no file that may be executed"


def folder(path: Path) -> str:
    path.mkdir()
    return f"{path} is no file that may be executed"


def nothing(path: Path) -> str:
    return f"there is no program {path}"


def without_interpreter(path: Path) -> str:
    file(path, "#! /no/shell -e\n")
    return f"{path} is a script for /no/shell, which is not there"


UNUSABLE = [not_executable, folder, nothing, without_interpreter]


@pytest.mark.parametrize("make", UNUSABLE)
def test_file_that_can_not_be_executed_is_told(
    tmp_path: Path, make: Callable[[Path], str]
) -> None:
    expected = make(tmp_path / "program")
    assert unusable(str(tmp_path / "program")) == expected


@pytest.mark.parametrize(
    "text", ["#!/bin/sh\n", "#!/bin/sh", "#! /bin/sh -e\n", "", "\0"]
)
def test_file_that_looks_usable_is_left_to_the_kernel(
    tmp_path: Path, text: str
) -> None:
    file(tmp_path / "program", text)
    assert unusable(str(tmp_path / "program")) == ""
    assert unusable("sh") == ""


STARTS = [
    ("no program", 0o755, "neither a program for this machine nor a script that begin"),
    ("#!/no/shell\n", 0o755, "its interpreter or dynamic loader is not there"),
    ("#!/bin/sh\n", 0o644, "Permission denied"),
    (None, 0, "No such file or directory"),
]


@pytest.mark.parametrize(("text", "mode", "expected"), STARTS)
def test_start_that_fails_has_its_reason(
    tmp_path: Path, text: str | None, mode: int, expected: str
) -> None:
    if text is not None:
        file(tmp_path / "program", text, mode)
    with pytest.raises(OSError, match=expected):
        Program([str(tmp_path / "program"), "{fd}"])
