# SPDX-License-Identifier: Apache-2.0
"""vhost-airlock as its users run it: a process between two sockets."""

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.real.processes import Process, listening

PATIENT = "--timeout=60"
"""Beside all else that runs here, a program may stand still for more than 5 s."""


@contextmanager
def airlock(
    back: Path | None,
    front: Path,
    *options: str,
    command: Sequence[str] = (),
    dials: bool = False,
    env: Mapping[str, str] | None = None,
) -> Iterator[Process]:
    """An airlock that listens at `front` for front-ends of the back-end at `back`.

    Without `back` it starts the back-end by `command`; with `dials` the front-end
    listens. It ends by SIGTERM, with status 0, its socket gone and no traceback in its
    log; but the test may kill it.
    """
    side = "--front-connect" if dials else "--socket-path"
    run = (sys.executable, "-m", "vhost_airlock", "run", f"{side}={front}", PATIENT)
    to = (f"--backend={back}",) if back else ("--", *command)
    log = front.with_suffix(".airlock.log")
    with Process([*run, *options, *to], log, env=env) as process:
        if not dials:
            process.wait_until(lambda: listening(front))
        yield process
        if process.popen.returncode != -signal.SIGKILL:
            assert process.stop() == 0, process.describe()
            assert dials or not front.exists(), process.describe()
        assert "Traceback" not in process.output(), process.describe()


@contextmanager
def reach(via: str, back: Path, *options: str) -> Iterator[Path]:
    """The front-end's way to a back-end: its own socket, or that of an airlock."""
    if via == "direct":
        yield back
        return
    front = back.with_suffix(".front")
    with airlock(back, front, *options):
        yield front
