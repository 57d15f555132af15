# SPDX-License-Identifier: Apache-2.0
"""`vhost-airlock-virtiofsd`: virtiofsd behind an airlock, with virtiofsd's options.

For programs that start virtiofsd by its path and with their own arguments, as libvirt
does. The airlock gets the socket, virtiofsd all other arguments. There is no way by
which virtiofsd gets the socket itself.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import AirlockError, StartError, UsageError
from ..proxy.device_types import find_type
from .capabilities import capabilities
from .main import main

NAME = "vhost-airlock-virtiofsd"
PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd")
"""Where distributions have virtiofsd; Debian 12 has it in the second."""
CHOICE = "VIRTIOFSD"
"""The environment variable that names another virtiofsd."""
TYPE = "--device-type=fs"
SOCKET = ("--fd", "--socket-path")
GROUP = "--socket-group"
HARMLESS = {"-h", "--help", "-V", "--version"}


def virtiofsd() -> int:
    """Do what virtiofsd would do with these arguments; returns the exit status."""
    arguments = sys.argv[1:]
    try:
        program = find_program()
        if "--print-capabilities" in arguments:
            return main(["run", TYPE, "--print-capabilities", "--", program])
        if "--print-descriptor" in arguments:
            print(json.dumps(descriptor(program, sys.argv[0]), indent=2))
            return 0
        ours, theirs = divide(arguments)
        if not any(word.startswith(SOCKET) for word in ours):
            if HARMLESS.intersection(theirs):
                return subprocess.run([program, *theirs], check=False).returncode
            raise UsageError(f"one of {', '.join(SOCKET)} is needed")
    except AirlockError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    run = ("run", *ours, "--once", TYPE)
    return main([*run, "--", program, "--fd={listen-fd}", *theirs])


def find_program() -> str:
    """Return the path of the real virtiofsd."""
    chosen = os.environ.get(CHOICE)
    for place in [chosen] if chosen else PLACES:
        if os.access(place, os.X_OK):
            return place
    if chosen:
        raise StartError(f"{CHOICE}={chosen}: there is no such program")
    raise StartError(f"there is no virtiofsd at {', '.join(PLACES)}")


def divide(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (the options that are about the socket, all other arguments)."""
    ours, theirs = [], []
    words = iter(arguments)
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in (*SOCKET, GROUP):
            theirs.append(word)
        elif equals:
            ours.append(word)
        else:
            value = next(words, None)
            if value is None:
                raise UsageError(f"{word} lacks a value")
            ours.append(f"{word}={value}")
    return ours, theirs


def descriptor(program: str, ours: str) -> dict[str, Any]:
    """Return the descriptor by which libvirt finds this program."""
    return {
        "description": "virtiofsd behind vhost-airlock",
        "binary": os.path.abspath(ours),
        **dataclasses.asdict(capabilities(find_type("fs"), [program])),
    }
