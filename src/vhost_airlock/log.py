# SPDX-License-Identifier: Apache-2.0
"""The log: lines of text, each with a level and the name of its log.

It is used as the standard library's `logging` is, and hands all lines to that library,
under the same names and levels. But `run` has a writer of its own (process/log.py), and
never loads the library, which would be a tenth of an airlock's time to start, and of
its memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

DEBUG, INFO, WARNING, ERROR = 10, 20, 30, 40
"""Levels, by the numbers of the standard library."""

Writer = Callable[[str, int, str], None]
"""Writes a line: the name of the log, the level, and the text, which may have newlines.
"""


class Logger:
    """Writes lines under a name. Logs with the same name are the same."""

    def __init__(self, name: str) -> None:
        self.name = name

    def log(
        self, level: int, text: str, *values: object, exc_info: bool = False
    ) -> None:
        """Write a line of this level: the text, with these values for its %s and %d.

        With `exc_info` the traceback of the exception that is being handled follows.
        """
        if level < _least:
            return
        if values:
            text %= values
        if exc_info:
            text += "\n" + _traceback()
        _write(self.name, level, text)

    def debug(self, text: str, *values: object, exc_info: bool = False) -> None:
        self.log(DEBUG, text, *values, exc_info=exc_info)

    def info(self, text: str, *values: object) -> None:
        self.log(INFO, text, *values)

    def warning(self, text: str, *values: object) -> None:
        self.log(WARNING, text, *values)

    def error(self, text: str, *values: object) -> None:
        self.log(ERROR, text, *values)


def write_by(writer: Writer, least: int) -> None:
    """Let this writer have all lines of the process, from the level `least` on."""
    global _write, _least
    if least <= DEBUG:
        _load()
    _write, _least = writer, least


def to_library(name: str, level: int, text: str) -> None:
    """Write a line by the standard library: the writer of a process that sets none."""
    import logging  # not at the start: see above

    logging.getLogger(name).log(level, "%s", text)


def _traceback() -> str:
    import traceback  # nor this: only for DEBUG

    return "".join(traceback.format_exception(sys.exception())).rstrip("\n")


def _load() -> None:
    """Load what tracebacks need, as long as no sandbox keeps files from us."""
    try:
        raise RuntimeError
    except RuntimeError:
        _traceback()


_write: Writer = to_library
_least = DEBUG
