# SPDX-License-Identifier: Apache-2.0
"""Tests of tables: one test for a whole table, which lists all rows that are wrong."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from typing import Any

import pytest

Test = Callable[[], None]


def each_row(table: Iterable[Any]) -> Callable[[Callable[..., None]], Test]:
    """Make one test of a check that takes a row: its columns, if the row is a tuple."""
    rows = list(table)
    assert rows, "a table without rows tests nothing"

    def decorate(check: Callable[..., None]) -> Test:
        def test() -> None:
            wrong = [found for row in rows if (found := fault(check, row))]
            if wrong:
                heading = f"{len(wrong)} of {len(rows)} rows are wrong:"
                pytest.fail("\n".join([heading, *wrong]), pytrace=False)

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        test.__module__, test.__qualname__ = check.__module__, check.__qualname__
        return test

    return decorate


def fault(check: Callable[..., None], row: Any) -> str:
    """How the check of a row fails: the row, the line of the test, and the reason.
    Empty if the check passes."""
    columns = row if type(row) is tuple else (row,)
    try:
        check(*columns)
    except (Exception, pytest.fail.Exception) as error:
        where = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == check.__code__.co_filename
        ]
        reason = "\n    ".join(
            [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]
        )
        named = ", ".join(map(repr, columns))
        return f"{named}: line {where[-1] if where else '?'}: {reason}"
    return ""
