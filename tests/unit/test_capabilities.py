# SPDX-License-Identifier: Apache-2.0
"""`run --print-capabilities`: what is told, of what, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vhost_airlock.cli import capabilities
from vhost_airlock.cli import main as cli
from vhost_airlock.proxy.device_types import TYPES

PRINT = ("run", "--print-capabilities")
WAYS = ("--socket-path=/nowhere/front", "--stats-path=/nowhere/stats")


@pytest.fixture
def telling(tmp_path: Path) -> Callable[[str], list[str]]:
    """A command for a program that prints a text, if it is asked as it should."""

    def make(text: str) -> list[str]:
        program = tmp_path / "back-end"
        asked = '[ "$*" = --print-capabilities ] || exit 1'
        program.write_text(f"#!/bin/sh\n{asked}\ncat <<'END'\n{text}\nEND\n")
        program.chmod(0o755)
        return ["--", str(program), "--fd={fd}"]

    return make


@pytest.mark.parametrize("kind", [each for each in TYPES if not each.refused], ids=str)
def test_type_of_the_option(capsys: pytest.CaptureFixture[str], kind) -> None:
    assert cli.main([*PRINT, *WAYS, f"--device-type={kind.number}"]) == 0
    assert json.loads(capsys.readouterr().out) == {"type": kind.name, "features": []}


TOLD = [
    ('{"type": "net"}', {"type": "net", "features": []}),
    ('{"type": "new"}', {"type": "new", "features": []}),
    (
        '{"type": "block", "features": ["read-only", "blk-file"], "more": 1}',
        {"type": "block", "features": ["read-only", "blk-file"]},
    ),
    (
        '{"type": "fs", "features": ["migrate-precopy", "separate-options"]}',
        {"type": "fs", "features": ["migrate-precopy", "separate-options"]},
    ),
]


@pytest.mark.parametrize(("text", "expected"), TOLD)
def test_capabilities_of_the_program(
    capsys: pytest.CaptureFixture[str], telling, text: str, expected: object
) -> None:
    assert cli.main([*PRINT, *WAYS, *telling(text)]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == (expected, "")


@pytest.mark.parametrize("kind", [each for each in TYPES if each.refused], ids=str)
def test_device_that_can_not_be_isolated_is_refused(
    capsys: pytest.CaptureFixture[str], telling, kind
) -> None:
    program = telling(json.dumps({"type": kind.name, "features": ["virgl"]}))
    for arguments in ([f"--device-type={kind.name}"], program):
        assert cli.main([*PRINT, *arguments]) == 1
        assert capsys.readouterr() == (
            "",
            f"vhost-airlock: a {kind.name} device can't be isolated: {kind.refused}\n",
        )


NOTHING = [
    "",
    "usage: back-end",
    "[]",
    "{}",
    '{"type": 1}',
    '{"type":"fs","features":1}',
]


@pytest.mark.parametrize("text", NOTHING)
def test_program_that_does_not_tell_needs_an_option(
    capsys: pytest.CaptureFixture[str], telling, text: str
) -> None:
    command = telling(text)
    assert cli.main([*PRINT, *command]) == 1
    assert capsys.readouterr() == (
        "",
        f"vhost-airlock: {command[1]} --print-capabilities prints no type: give"
        " --device-type\n",
    )
    assert cli.main([*PRINT, "--device-type=fs", *command]) == 0
    assert json.loads(capsys.readouterr().out) == {"type": "fs", "features": []}


def test_program_that_begins_to_work_is_not_waited_for(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(capabilities, "PATIENCE", 0.1)
    program = tmp_path / "back-end"
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o755)
    assert cli.main([*PRINT, "--", str(program), "{fd}"]) == 1
    assert "prints no type" in capsys.readouterr().err


def test_option_that_contradicts_the_program_is_told(
    capsys: pytest.CaptureFixture[str], telling
) -> None:
    command = telling('{"type": "net"}')
    assert cli.main([*PRINT, "--device-type=fs", *command]) == 1
    assert capsys.readouterr().err == (
        f"vhost-airlock: --device-type fs: {command[1]} is a back-end of type net\n"
    )
