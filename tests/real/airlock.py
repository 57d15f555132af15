"""vhost-airlock as its users run it: a process between two sockets."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.real.processes import Process, listening


@contextmanager
def airlock(back: Path, front: Path, *options: str) -> Iterator[Process]:
    """An airlock that listens at `front` for front-ends of the back-end at `back`.

    It ends by SIGTERM, with status 0, its socket gone and no traceback in its log.
    """
    command = (sys.executable, "-m", "vhost_airlock", "run")
    paths = (f"--socket-path={front}", f"--backend={back}")
    log = front.with_suffix(".airlock.log")
    with Process([*command, *paths, *options], log) as process:
        process.wait_until(lambda: listening(front))
        yield process
        assert process.stop() == 0, process.describe()
        assert not front.exists(), process.describe()
        assert "Traceback" not in process.output(), process.describe()
