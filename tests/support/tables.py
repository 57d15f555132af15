# SPDX-License-Identifier: Apache-2.0
"""Tests of tables: one test for a whole table, which lists all rows that are wrong."""

from __future__ import annotations

import inspect
import reprlib
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest

Test = Callable[..., None]

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 120


def each_row(table: Iterable[Any]) -> Callable[[Callable[..., None]], Test]:
    """Make one test of a check that takes a row: its columns, if the row is a tuple.
    Keyword-only parameters of the check are fixtures, which all rows share."""
    rows = list(table)
    assert rows, "a table without rows tests nothing"

    def decorate(check: Callable[..., None]) -> Test:
        def test(**fixtures: Any) -> None:
            one = partial(check, **fixtures)
            found = [fault(one, check.__code__.co_filename, row) for row in rows]
            wrong = [each for each in found if each]
            if wrong:
                heading = f"{len(wrong)} of {len(rows)} rows are wrong:"
                pytest.fail("\n".join([heading, *wrong]), pytrace=False)

        test.__signature__ = inspect.Signature(fixtures_of(check))  # type: ignore[attr-defined]
        test.__name__, test.__doc__ = check.__name__, check.__doc__
        test.__module__, test.__qualname__ = check.__module__, check.__qualname__
        return test

    return decorate


def fixtures_of(check: Callable[..., None]) -> list[inspect.Parameter]:
    parameters = inspect.signature(check).parameters.values()
    return [each for each in parameters if each.kind is each.KEYWORD_ONLY]


def fault(check: Callable[..., None], file: str, row: Any) -> str:
    """How the check of a row fails: the row, the line in the check's file, the reason.
    Empty if it passes."""
    columns = row if type(row) is tuple else (row,)
    try:
        check(*columns)
    except (Exception, pytest.fail.Exception) as error:
        where = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == file
        ]
        reason = "\n    ".join(
            [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]
        )
        named = ", ".join(map(SHORT.repr, columns))
        return f"{named}: line {where[-1] if where else '?'}: {reason}"
    return ""
