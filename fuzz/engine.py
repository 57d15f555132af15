# SPDX-License-Identifier: Apache-2.0
"""One target under libFuzzer: `python -m fuzz.engine TARGET [option or corpus]...`.

The code that an input reaches guides the choice of the next inputs: the data plane was
built with counters for that (tools/fuzz), and the package's Python gets them here.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from importlib import import_module

import atheris


def strictly(one: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """An `Fd` that the garbage collector had to close is a finding too."""
    lost: list[str] = []
    warnings.simplefilter("error", ResourceWarning)
    sys.unraisablehook = lambda unraisable: lost.append(repr(unraisable.exc_value))

    def run(data: bytes) -> None:
        one(data)
        assert not lost, lost

    return run


def main() -> None:
    name, *options = sys.argv[1:]
    # For a merge, libFuzzer lets the shell run this again.
    program = f"{sys.executable} -m fuzz.engine {name}"
    logging.disable()
    with atheris.instrument_imports(include=["vhost_airlock"]):
        target = import_module(f"fuzz.targets.{name}")
    atheris.Setup([program, *options], strictly(target.one))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
