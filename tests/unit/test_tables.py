# SPDX-License-Identifier: Apache-2.0
"""A test of a table names each wrong row, and passes only if there is none."""

import inspect

import pytest

from tests.support.tables import each_row


def smaller(number: int, limit: int) -> None:
    assert number < limit


def test_all_wrong_rows_are_listed_and_no_other() -> None:
    test = each_row([(1, 2), (3, 2), (0, 2), (7, 5)])(smaller)
    with pytest.raises(pytest.fail.Exception) as failed:
        test()
    heading, *rows = str(failed.value).splitlines()
    assert heading == "2 of 4 rows are wrong:"
    named = [row.partition(": line ")[0] for row in rows if ": line " in row]
    assert named == ["3, 2", "7, 5"]


def test_a_table_without_wrong_rows_passes() -> None:
    each_row([(1, 2), (0, 2)])(smaller)()


def test_an_error_that_should_have_come_and_did_not_is_a_wrong_row() -> None:
    def raises(number: int) -> None:
        with pytest.raises(ZeroDivisionError):
            _ = 1 // number

    with pytest.raises(pytest.fail.Exception, match=r"^1 of 2 rows are wrong:\n5: "):
        each_row([0, 5])(raises)()


def test_a_table_without_rows_is_refused() -> None:
    with pytest.raises(AssertionError):
        each_row([])


def test_keyword_only_parameters_are_fixtures() -> None:
    seen = []

    def check(number: int, *, tmp_path: str) -> None:
        seen.append((number, tmp_path))

    test = each_row([1, 2])(check)
    assert list(inspect.signature(test).parameters) == ["tmp_path"]
    test(tmp_path="here")
    assert seen == [(1, "here"), (2, "here")]
