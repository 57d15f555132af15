# SPDX-License-Identifier: Apache-2.0
"""The way to a back-end, as its user names it: a path, or a command.

It comes from the command line at the start, or later from the control socket, as a JSON
object: {"backend": "/path"}, or {"command": ["program", "argument", ...]}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from ..errors import StartError, UsageError
from ..record import record
from .command import CONNECTED_FD, LISTENING_FD
from .sockets import LONGEST_PATH, require_socket

MOST_WORDS = 1024
"""Of a command from the control socket."""


@record
class Target:
    """Where the back-end listens, or the command that starts it; or neither."""

    path: str | None = None
    command: tuple[str, ...] = ()

    @classmethod
    def parse(cls, told: dict[str, Any]) -> Self:
        """Return the target in a JSON object. UsageError if there is not one."""
        path, command = told.get("backend"), told.get("command")
        if (path is None) == (command is None):
            raise UsageError("a path or a command of a back-end is needed, and no more")
        if path is not None:
            return cls(path=_absolute(path))
        words = command if isinstance(command, list) else []
        if not 0 < len(words) <= MOST_WORDS or not all(map(_is_word, words)):
            raise UsageError(f"the command is no list of 1 to {MOST_WORDS} words")
        require_command(words)
        return cls(command=tuple(words))

    def told(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        if self.command:
            return {"command": list(self.command)}
        return {"backend": self.path}

    def require_there(self) -> None:
        """Raise StartError if there is no socket, or no program to start."""
        if self.path is not None:
            require_socket(self.path)
        else:
            require_program(self.command[0])


def require_command(command: Sequence[str]) -> None:
    """Raise UsageError if a command has no place, or two, for its socket's number."""
    whole = " ".join(command)
    if (CONNECTED_FD in whole) == (LISTENING_FD in whole):
        raise UsageError(
            f"the back-end's command must have either {CONNECTED_FD}"
            f" or {LISTENING_FD} in it: {whole}"
        )


def require_program(program: str) -> None:
    """Raise StartError if a program can't be started, as far as its file shows it."""
    from .program import unusable  # see `command`

    if trouble := unusable(program):
        raise StartError(f"no back-end: {trouble}")


def _absolute(path: Any) -> str:
    """Return a path, which has to be one whatever the folder of the process is."""
    if not _is_word(path) or not path.startswith("/"):
        raise UsageError(f"the back-end's path does not begin at /: {path!a:.100}")
    if len(path.encode(errors="surrogateescape")) > LONGEST_PATH:
        raise UsageError(f"{path}: a socket's path has at most {LONGEST_PATH} bytes")
    return str(path)


def _is_word(value: Any) -> bool:
    """Can it be an argument of a program?"""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False
    return True
