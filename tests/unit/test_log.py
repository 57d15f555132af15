# SPDX-License-Identifier: Apache-2.0
"""The lines of the log: name, level and text, for a terminal and for the journal."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vhost_airlock.log import DEBUG, ERROR, INFO, WARNING, Logger
from vhost_airlock.process.log import Lines, is_journal
from vhost_airlock.proxy.config import Config

PROCESS = Logger("vhost_airlock.process.daemon")
DISK, NET = Config(name="disk.sock").log, Config(name="net.sock").log
PROGRAM = """
import sys
from vhost_airlock.log import ERROR, Logger
from vhost_airlock.process.log import log_to_stderr
from vhost_airlock.proxy.config import Config
log_to_stderr("info", "front.sock")
log = Config(name="disk 1").log
log.debug("too much")
try:
    raise ValueError("first\\nsecond")
except ValueError:
    log.log(ERROR, "ring %d is broken", 7, exc_info=True)
Logger("vhost_airlock.sandbox").info("locked")
assert "logging" not in sys.modules
"""


def lines(log: Logger, level: int, text: str, *, journal: bool) -> str:
    return Lines("front.sock", journal=journal).format(log.name, level, text)


@pytest.mark.parametrize(
    ("level", "word", "number"),
    [
        (DEBUG, "debug", 7),
        (INFO, "info", 6),
        (WARNING, "warning", 4),
        (ERROR, "error", 3),
    ],
)
def test_line_names_device_and_level(level: int, word: str, number: int) -> None:
    """The numbers are those of sd-daemon(3)."""
    assert lines(DISK, level, "so it is", journal=False) == (
        f"vhost-airlock disk.sock: {word}: so it is\n"
    )
    assert lines(DISK, level, "so it is", journal=True) == (
        f"<{number}>disk.sock: so it is\n"
    )


def test_devices_of_one_process_are_told_apart() -> None:
    """Lines about no device have the name of the process."""
    told = [lines(log, INFO, "text", journal=False) for log in (DISK, NET, PROCESS)]
    assert told == [
        "vhost-airlock disk.sock: info: text\n",
        "vhost-airlock net.sock: info: text\n",
        "vhost-airlock front.sock: info: text\n",
    ]


def test_no_line_is_without_a_head() -> None:
    """The journal would take its priority for another one."""
    assert lines(DISK, ERROR, "a\n<7>b", journal=True) == (
        "<3>disk.sock: a\n<3>disk.sock: <7>b\n"
    )


def test_journal_is_found_by_what_systemd_says(tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w") as file:
        found = os.fstat(file.fileno())
        said = f"{found.st_dev}:{found.st_ino}"
        assert is_journal(file.fileno(), {"JOURNAL_STREAM": said})
        for other in ({}, {"JOURNAL_STREAM": f"{said}0"}, {"JOURNAL_STREAM": ""}):
            assert not is_journal(file.fileno(), other)
    assert not is_journal(9999, {"JOURNAL_STREAM": said})


@pytest.mark.parametrize("journal", [True, False])
def test_process_writes_lines_to_stderr(tmp_path: Path, *, journal: bool) -> None:
    path = tmp_path / "stderr"
    with path.open("w") as file:
        found = os.fstat(file.fileno())
        stream = f"{found.st_dev}:{found.st_ino}" if journal else "1:2"
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "JOURNAL_STREAM": stream},
            stderr=file,
            check=True,
        )
    error = "<3>disk 1: " if journal else "vhost-airlock disk 1: error: "
    info = "<6>front.sock: " if journal else "vhost-airlock front.sock: info: "
    first, *traceback, last = path.read_text().splitlines()
    assert first == f"{error}ring 7 is broken"
    assert traceback[-2:] == [f"{error}ValueError: first", f"{error}second"]
    assert all(line.startswith(error) for line in traceback)
    assert last == f"{info}locked"


def test_lines_of_a_library_go_to_the_standard_library(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where no program has said otherwise, with their names and levels."""
    caplog.set_level(logging.INFO)
    log = Logger("vhost_airlock.vhost")
    log.debug("too much")
    log.warning("%s: refused: %d %%", "VMM", 7)
    log.info("100 %")
    assert caplog.record_tuples == [
        ("vhost_airlock.vhost", logging.WARNING, "VMM: refused: 7 %"),
        ("vhost_airlock.vhost", logging.INFO, "100 %"),
    ]


def test_full_stderr_loses_lines_and_stops_nobody() -> None:
    """So do those that nothing reads any more."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    program = """
import os
from vhost_airlock.log import Logger
from vhost_airlock.process.log import log_to_stderr
log_to_stderr("info", "process")
for _ in range(10_000):
    Logger("").info("a line that nobody reads")
os.write(1, b"full ")
os.read(0, 1)
Logger("").info("another one")
os.write(1, b"gone")
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=writer,
    ) as process:
        os.close(writer)
        assert process.stdin is not None
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 5) == b"full "
        os.close(reader)
        process.stdin.write(b"x")
        process.stdin.close()
        assert process.stdout.read() == b"gone"
    assert process.returncode == 0
