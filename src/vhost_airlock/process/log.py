# SPDX-License-Identifier: Apache-2.0
"""The log of the process, on stderr: each line names its device and its level."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from ..proxy.config import DEVICE_LOGS

PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
}
"""Levels as the journal numbers them, see sd-daemon(3)."""


class Lines(logging.Formatter):
    """Puts a head before each line of a record, also before those of a traceback.

    A terminal or a file gets the program's name and the level in words. The journal
    knows the program, and gets the level as a number. A line that is about no device
    has the name `process`.
    """

    def __init__(self, process: str, *, journal: bool) -> None:
        super().__init__()
        self.process = process
        self.journal = journal

    def format(self, record: logging.LogRecord) -> str:
        name = self.process
        if record.name.startswith(DEVICE_LOGS):
            name = record.name.removeprefix(DEVICE_LOGS)
        head = f"vhost-airlock {name}: {record.levelname.lower()}: "
        if self.journal:
            head = f"<{PRIORITIES[record.levelno]}>{name}: "
        return "\n".join(head + line for line in super().format(record).split("\n"))


def log_to_stderr(level: str, process: str) -> None:
    """Let all logs write to stderr, from this level on."""
    handler = logging.StreamHandler()
    handler.setFormatter(Lines(process, journal=is_journal(2, os.environ)))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def is_journal(fd: int, environment: Mapping[str, str]) -> bool:
    """Does the journal read this descriptor, by the environment that systemd sets?"""
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return environment.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
