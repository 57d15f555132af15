# SPDX-License-Identifier: Apache-2.0
"""The fixtures of tests; and a check that no test leaves anything behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.backs import ScriptedBack
from tests.support.leftovers import held
from tests.support.program import listening


@pytest.fixture(autouse=True)
def nothing_is_left(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No descriptor, no thread, no mapping of isolated or guest memory."""
    gc.collect()
    before = held()
    yield
    # The records have exceptions, whose tracebacks hold on to all there was.
    caplog.get_records("call").clear()
    caplog.clear()
    assert held() == before


@pytest.fixture
def front(tmp_path: Path) -> Path:
    """Where an airlock can listen."""
    return tmp_path / "front.sock"


@pytest.fixture
def back() -> ScriptedBack:
    return ScriptedBack()


@pytest.fixture
def where(back: ScriptedBack, tmp_path: Path) -> Iterator[Path]:
    """Where the back listens."""
    with listening(back, tmp_path / "back.sock") as path:
        yield path
