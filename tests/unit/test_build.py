# SPDX-License-Identifier: Apache-2.0
"""The compiled modules are hardened: what setup.py asks for is in them."""

from __future__ import annotations

import importlib
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from vhost_airlock.dataplane import pump

COMPILED = sorted(
    path.name.partition(".")[0] for path in Path(pump.__file__).parent.glob("*.so")
)


def readelf(name: str, *options: str) -> str:
    """The output of binutils, which the compiler needs too, about a module."""
    module = importlib.import_module(f"vhost_airlock.dataplane.{name}")
    assert module.__file__ is not None
    done = subprocess.run(
        ["readelf", "--wide", *options, module.__file__],
        capture_output=True,
        check=True,
        text=True,
    )
    return done.stdout


@pytest.mark.parametrize("name", COMPILED)
def test_no_function_is_looked_up_after_the_start(name: str) -> None:
    """So the table of their addresses can be, and is, read-only."""
    assert "BIND_NOW" in readelf(name, "--dynamic")
    assert "GNU_RELRO" in readelf(name, "--program-headers")


@pytest.mark.parametrize("name", COMPILED)
def test_overwritten_stack_is_noticed(name: str) -> None:
    assert "__stack_chk_fail" in readelf(name, "--dyn-syms")


@pytest.mark.parametrize("name", COMPILED)
def test_no_memory_is_both_writable_and_executable(name: str) -> None:
    lines = readelf(name, "--program-headers").splitlines()
    assert any("GNU_STACK" in line for line in lines)
    assert not any(" RWE " in line for line in lines)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 has this")
@pytest.mark.parametrize("name", COMPILED)
def test_functions_begin_with_a_mark_for_jumps(name: str) -> None:
    """ENDBR64, for processors and kernels that look at it."""
    module = importlib.import_module(f"vhost_airlock.dataplane.{name}")
    assert module.__file__ is not None
    assert Path(module.__file__).read_bytes().count(b"\xf3\x0f\x1e\xfa") > 2


def test_a_tree_without_sources_is_no_package(tmp_path: Path) -> None:
    """An sdist that lacks them shall not become a wheel without compiled modules."""
    setup = Path(__file__).parents[2] / "setup.py"
    (tmp_path / setup.name).write_bytes(setup.read_bytes())
    (tmp_path / "src" / "vhost_airlock").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, setup.name, "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "setup.py: src/vhost_airlock has no .pyx file to compile\n"
