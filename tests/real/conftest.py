# SPDX-License-Identifier: Apache-2.0
"""Tests with real programs: each runs through the airlock, and many run direct too.

A direct test shows that programs do without the airlock all that is asked of them with
it. Those with guests, and those of files with the marker `long`, take minutes: they run
with --direct.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.real.airlock import airlock
from tests.real.blkdrive import BlkDrive
from tests.real.processes import Process
from tests.real.programs import Programs, need, new_folder
from tests.real.serving import serving
from tests.real.storage import Disk, StorageDaemon, storage_daemon
from tests.support.backs import RecordedBack
from tests.support.schedule import has_guests


def pytest_collection_modifyitems(config, items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.real)
    if not config.getoption("--direct"):
        left_out = [item for item in items if is_long_direct(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not is_long_direct(item)]


def is_long_direct(item: pytest.Item) -> bool:
    """Does a test take long, and connect its programs directly to a back-end?"""
    case = getattr(item, "callspec", None)
    if case is None or "direct" not in case.params.values():
        return False
    return has_guests(item.path) or item.get_closest_marker("long") is not None


@pytest.fixture(scope="session")
def programs() -> Programs:
    return need()


@pytest.fixture
def folder() -> Iterator[Path]:
    with new_folder() as path:
        yield path


@pytest.fixture
def drive(programs: Programs, folder: Path) -> BlkDrive:
    return BlkDrive(programs, folder)


@pytest.fixture(params=["direct", "airlock"])
def via(request: pytest.FixtureRequest) -> str:
    """How the front-end reaches its back-end."""
    return str(request.param)


class Served:
    """A disk that is being served: its front socket, and the back-end's process."""

    def __init__(
        self, front: Path, backend: StorageDaemon, proxy: Process | None
    ) -> None:
        self.front = front
        self.backend = backend
        self.proxy = proxy


@pytest.fixture
def serve(
    programs: Programs, folder: Path, via: str
) -> Iterator[Callable[..., Served]]:
    """serve(disk, *options): a storage daemon and maybe an airlock serve it."""
    with ExitStack() as stack:

        def serve_one(disk: Disk, *options: str) -> Served:
            daemon, back = stack.enter_context(
                storage_daemon(programs, disk, folder / "back.sock")
            )
            if via == "direct":
                return Served(back, daemon, None)
            front = folder / "front.sock"
            proxy = stack.enter_context(airlock(back, front, *options))
            return Served(front, daemon, proxy)

        yield serve_one


@pytest.fixture
def connect(via: str, folder: Path) -> Iterator[Callable[..., Path]]:
    """connect(back, *options): the socket at which a test's back-end can be reached."""
    with ExitStack() as stack:

        def connect_one(back: RecordedBack, *options: str) -> Path:
            path = folder / "back.sock"
            stack.enter_context(serving(back, path))
            if via == "direct":
                return path
            front = folder / "front.sock"
            stack.enter_context(airlock(path, front, *options))
            return front

        yield connect_one


@pytest.fixture(scope="session")
def direct_results() -> dict[str, Any]:
    return {}


@pytest.fixture
def same_as_direct(
    request: pytest.FixtureRequest, via: str, direct_results: dict[str, Any]
) -> Callable[[object], None]:
    """Compare a result with that of the same test run direct, which ran before."""
    name = request.node.name.replace("airlock", "direct")

    def compare(result: object) -> None:
        if via == "direct":
            direct_results[name] = result
        elif name in direct_results:
            assert result == direct_results[name]

    return compare
