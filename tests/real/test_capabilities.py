# SPDX-License-Identifier: Apache-2.0
"""`run --print-capabilities` with real back-ends."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.real.programs import Programs
from vhost_airlock.cli import main as cli


@pytest.fixture
def command(programs: Programs, folder: Path):
    """The command that starts a program, as a program of its own."""

    def make(name: str) -> list[str]:
        path = folder / name
        words = shlex.join(programs(programs.find(name)))
        path.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        path.chmod(0o755)
        return ["--", str(path), "--fd={fd}"]

    return make


def test_virtiofsd_tells_its_features(command, capsys) -> None:
    assert cli.main(["run", "--print-capabilities", *command("virtiofsd")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["type"] == "fs"
    assert "separate-options" in told["features"]
    assert "migrate-precopy" in told["features"]


@pytest.mark.parametrize(
    ("name", "kind"), [("passt", "net"), ("vhost-device-vsock", "vsock")]
)
def test_others_need_an_option(command, capsys, name, kind) -> None:
    """passt prints them on stderr, and vhost-device-vsock does not know the option."""
    print_it = ["run", "--print-capabilities"]
    assert cli.main([*print_it, *command(name)]) == 1
    assert "prints no type: give --device-type" in capsys.readouterr().err
    assert cli.main([*print_it, f"--device-type={kind}", *command(name)]) == 0
    assert json.loads(capsys.readouterr().out) == {"type": kind, "features": []}
