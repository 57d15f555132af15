# SPDX-License-Identifier: Apache-2.0
"""The inputs that fuzzing has kept do no harm: each ran into something once, or covers
what nothing else does. This is the ordinary build; see fuzz/run.py for the other."""

from __future__ import annotations

import gc
from importlib import import_module
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "fuzz"
TARGETS = sorted(path.stem for path in (FUZZ / "targets").glob("[a-z]*.py"))


def inputs(name: str) -> list[Path]:
    return sorted((FUZZ / "corpus" / name).iterdir())


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_of(name):
    target = import_module(f"fuzz.targets.{name}")
    assert inputs(name)
    gc.collect()  # descriptors of other tests are not to be closed meanwhile
    for path in inputs(name):
        try:
            target.one(path.read_bytes())
        except BaseException as error:
            error.add_note(f"with {path}")
            raise


def test_the_corpus_is_small():
    files = [path for name in TARGETS for path in inputs(name)]
    assert sum(path.stat().st_size for path in files) < 300 << 10
