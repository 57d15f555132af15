# SPDX-License-Identifier: Apache-2.0
"""The airlock of this tree against that of another revision, on the same daemon.

Only one thing differs between two runs of a pair: the build. Both airlocks are started
anew for each round, for where a process happens to lie in memory changes its speed too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.fronts import Fronts
from bench.machine import said
from bench.measure import Bench
from bench.runs import BenchError, Case, Run
from bench.targets import back_end, through_airlock
from tests.real.programs import PROJECT, Programs

BEFORE, NOW = "before", "now"
SOURCE = "src"


def build(revision: str, project: Path = PROJECT) -> Path:
    """Return the folder with the compiled modules of a revision of this project.

    Each revision is built once, in build/against.
    """
    name = ["git", "-C", str(project), "rev-parse", "--verify", "--quiet"]
    commit = said([*name, f"{revision}^{{commit}}"])
    if not commit:
        raise BenchError(f"there is no revision {revision}")
    folder = project / "build" / "against" / commit
    ready = folder / "ready"
    if not ready.exists():
        folder.mkdir(parents=True, exist_ok=True)
        export(project, commit, folder)
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        env = {**os.environ, "PYTHONPATH": str(folder / SOURCE)}
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True
        )
        if done.returncode:
            raise BenchError(f"{revision} cannot be built:\n{done.stderr[-2000:]}")
        ready.touch()
    return folder / SOURCE


def export(project: Path, commit: str, folder: Path) -> None:
    """Write the files of a commit into a folder."""
    archive = ["git", "-C", str(project), "archive", commit]
    with subprocess.Popen(archive, stdout=subprocess.PIPE) as sender:
        unpack = ["tar", "-x", "-C", str(folder)]
        done = subprocess.run(unpack, stdin=sender.stdout)
    if sender.returncode or done.returncode:
        raise BenchError(f"cannot write the files of {commit} into {folder}")


def measure_both(
    programs: Programs,
    folder: Path,
    cases: Sequence[Case],
    sources: tuple[Path, Path],
    ms: int,
    until: float,
    failures: list[str],
    progress: Callable[[str], None],
) -> Generator[Run]:
    """Measure the builds before and now in turns, until a time of the monotonic clock.

    Front-end and back-end have a core each, if there are two. Cases that could not be
    measured are added to `failures`.
    """
    fronts = Fronts(programs, folder, ms, core=0)
    with back_end(programs, folder, core=1) as (daemon, back):
        number = 0
        while number == 0 or time.monotonic() < until:
            with ExitStack() as stack:
                both = [
                    stack.enter_context(
                        through_airlock(name, daemon, back, folder, source=source)
                    )
                    for name, source in zip((BEFORE, NOW), sources, strict=True)
                ]
                bench = Bench(fronts, both, failures)
                left = f"{until - time.monotonic():.0f} s left, "
                yield from bench.measure_round(cases, number, progress, left, until)
            number += 1
