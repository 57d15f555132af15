# SPDX-License-Identifier: Apache-2.0
"""The front-end over libblkio, blkdrive.c."""

import json
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

from tests.real.processes import Process
from tests.real.programs import Programs


class BlkDrive:
    """Runs it against a socket."""

    def __init__(self, programs: Programs, logs: Path) -> None:
        self.programs = programs
        self.program = programs.compile(Path(__file__).with_suffix(".c"), "blkio")
        self.logs = logs
        self.runs = 0

    def start(
        self, front: Path, mode: str, stdin: int = DEVNULL, **options: Any
    ) -> Process:
        """Options are those at the top of blkdrive.c, '-' written as '_'."""
        words = [f"{key.replace('_', '-')}={value}" for key, value in options.items()]
        argv = self.programs(self.program, str(front), mode, *words)
        self.runs += 1
        return Process(argv, self.logs / f"blkdrive-{self.runs}.log", stdin=stdin)

    def run(self, front: Path, mode: str, status: int = 0, **options: Any) -> Any:
        """Run it to its end: the JSON that it prints."""
        with self.start(front, mode, **options) as process:
            assert process.wait(timeout=100) == status, process.describe()
            return json.loads(process.output())
