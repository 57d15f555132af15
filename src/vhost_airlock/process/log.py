# SPDX-License-Identifier: Apache-2.0
"""The log of the process, on stderr: each line names its device and its level."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping

from ..log import DEBUG, ERROR, INFO, WARNING, write_by
from ..proxy.config import DEVICE_LOGS

LEVELS = {"debug": DEBUG, "info": INFO, "warning": WARNING, "error": ERROR}
WORDS = {level: word for word, level in LEVELS.items()}
PRIORITIES = {DEBUG: 7, INFO: 6, WARNING: 4, ERROR: 3}
"""Levels as the journal numbers them, see sd-daemon(3)."""

STDERR = 2


class Lines:
    """Puts a head before each line of a text, also before those of a traceback.

    A terminal or a file gets the program's name and the level in words. The journal
    knows the program, and gets the level as a number. A line that is about no device
    has the name `process`.
    """

    def __init__(self, process: str, *, journal: bool) -> None:
        self.process = process
        self.journal = journal

    def format(self, log: str, level: int, text: str) -> str:
        """Return the lines of this text, which came to the log of this name."""
        name = self.process
        if log.startswith(DEVICE_LOGS):
            name = log.removeprefix(DEVICE_LOGS)
        head = f"vhost-airlock {name}: {WORDS[level]}: "
        if self.journal:
            head = f"<{PRIORITIES[level]}>{name}: "
        return "".join(f"{head}{line}\n" for line in text.split("\n"))

    def write(self, log: str, level: int, text: str) -> None:
        """Write them to stderr at once, from any thread or handler of a signal. If
        nothing reads there any more, or there is no room, they are lost.
        """
        data = self.format(log, level, text).encode(errors="backslashreplace")
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(STDERR, data) :]


def log_to_stderr(level: str, process: str) -> None:
    """Let all logs write to stderr, from this one of LEVELS on."""
    journal = is_journal(STDERR, os.environ)
    write_by(Lines(process, journal=journal).write, LEVELS[level])


def is_journal(fd: int, environment: Mapping[str, str]) -> bool:
    """Does the journal read this descriptor, by the environment that systemd sets?"""
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return environment.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
