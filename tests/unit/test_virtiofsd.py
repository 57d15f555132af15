# SPDX-License-Identifier: Apache-2.0
"""The program that stands in for virtiofsd: which arguments go where."""

import json
import sys
from pathlib import Path

import pytest

from vhost_airlock.cli import virtiofsd
from vhost_airlock.errors import StartError

FAKE = """#!/bin/sh
case $1 in
    --print-capabilities) echo '{answer}' ;;
    *) echo "$@" ;;
esac
"""
FEATURES = ["migrate-precopy", "separate-options"]


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A virtiofsd that prints its arguments."""
    path = tmp_path / "virtiofsd"
    say(path, json.dumps({"type": "fs", "features": FEATURES}))
    monkeypatch.setenv("VIRTIOFSD", str(path))
    return path


def say(path: Path, answer: str) -> None:
    """Let it print this as its capabilities."""
    path.write_text(FAKE.replace("{answer}", answer))
    path.chmod(0o755)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines of airlocks that would have been started."""
    found: list[list[str]] = []

    def main(arguments: list[str]) -> int:
        found.append(arguments)
        return 7

    monkeypatch.setattr(virtiofsd, "main", main)
    return found


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vhost-airlock-virtiofsd", *arguments])
    return virtiofsd.virtiofsd()


@pytest.mark.parametrize(
    ("arguments", "ours", "theirs"),
    [
        (["--fd=5", "-o", "source=/a"], ["--fd=5"], ["-o", "source=/a"]),
        (["--fd", "5", "--shared-dir", "/a"], ["--fd=5"], ["--shared-dir", "/a"]),
        (["-d", "--socket-path=/s"], ["--socket-path=/s"], ["-d"]),
        (
            ["--socket-path", "/s", "--socket-group", "g", "--log-level=debug"],
            ["--socket-path=/s", "--socket-group=g"],
            ["--log-level=debug"],
        ),
    ],
)
def test_airlock_gets_the_socket_and_virtiofsd_the_rest(
    monkeypatch, real, started, arguments, ours, theirs
):
    assert call(monkeypatch, *arguments) == 7
    command = ["--", str(real), "--fd={listen-fd}", *theirs]
    assert started == [["run", *ours, "--once", "--device-type=fs", *command]]


@pytest.mark.parametrize("argument", ["--help", "-h", "--version", "-V"])
def test_virtiofsd_answers_questions(monkeypatch, real, started, capfd, argument):
    assert call(monkeypatch, argument) == 0
    assert capfd.readouterr().out == f"{argument}\n"
    assert started == []


@pytest.mark.parametrize(
    ("arguments", "trouble"),
    [
        ([], "one of --fd, --socket-path is needed"),
        (["-o", "vhost_user_socket=/s"], "one of --fd, --socket-path is needed"),
        (["--fd"], "--fd lacks a value"),
        (["--help", "--socket-path"], "--socket-path lacks a value"),
    ],
)
def test_virtiofsd_is_never_started_without_an_airlock(
    monkeypatch, real, started, capfd, arguments, trouble
):
    assert call(monkeypatch, *arguments) == 2
    assert capfd.readouterr() == ("", f"vhost-airlock-virtiofsd: {trouble}\n")
    assert started == []


def test_capabilities_are_those_of_an_airlock_with_virtiofsd(
    monkeypatch, real, started
):
    assert call(monkeypatch, "--print-capabilities", "--fd=5") == 7
    assert started == [
        ["run", "--device-type=fs", "--print-capabilities", "--", str(real)]
    ]


def test_descriptor_names_the_program_by_its_path(monkeypatch, real, capfd):
    assert call(monkeypatch, "--print-descriptor") == 0
    assert json.loads(capfd.readouterr().out) == {
        "description": "virtiofsd behind vhost-airlock",
        "type": "fs",
        "binary": "/usr/bin/vhost-airlock-virtiofsd",
        "features": FEATURES,
    }


def test_virtiofsd_without_capabilities_has_a_descriptor(monkeypatch, real, capfd):
    say(real, "usage")
    assert call(monkeypatch, "--print-descriptor") == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["type"], told["features"]) == ("fs", [])


def test_virtiofsd_that_is_not_there_is_told(monkeypatch, real, capfd):
    real.unlink()
    assert call(monkeypatch, "--fd=5") == 1
    assert capfd.readouterr().err == (
        f"vhost-airlock-virtiofsd: VIRTIOFSD={real}: there is no such program\n"
    )


def test_first_place_of_virtiofsd_is_taken(monkeypatch, real, tmp_path):
    monkeypatch.delenv("VIRTIOFSD")
    monkeypatch.setattr(virtiofsd, "PLACES", (str(tmp_path / "none"), str(real)))
    assert virtiofsd.find_program() == str(real)
    monkeypatch.setattr(virtiofsd, "PLACES", (str(tmp_path / "none"),))
    with pytest.raises(StartError, match="there is no virtiofsd at /"):
        virtiofsd.find_program()
