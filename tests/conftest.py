# SPDX-License-Identifier: Apache-2.0
"""Parts that all tests share: real programs, the order of tests, folders, the end."""

import faulthandler
import gc
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.real.programs import find
from tests.support.schedule import Scheduler, has_guests
from vhost_airlock import log

# Tests start thousands of airlocks and back-ends, which read their modules compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--direct",
        action="store_true",
        help="run the long tests on direct connections too",
    )


def pytest_report_header():
    found = find()
    if isinstance(found, str):
        return f"real programs: left out ({found})"
    return f"real programs: in {found.root}"


def pytest_xdist_auto_num_workers() -> int:
    """More than there are processors: for half of their time, tests wait."""
    return len(os.sched_getaffinity(0)) + 2


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduler:
    return Scheduler(config, log)


ABOUT_THE_DATA_PLANE = {
    "integration": (
        "attack deaths dirty_log_oracle equivalence hostile_guest kills stopping"
    ),
    "property": "pump_stateful",
    "unit": (
        "bounce dirty_log_races guest_ring invariants mutators polling pool pump races"
        " recorded regions shadow_ring window worker"
    ),
}
"""Files of tests in which pytest-cov does not look: they would take half as long again,
and others reach the lines of Python that they reach."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not has_guests(item.path))
    for item in items:
        folder, file = item.path.parent.name, item.path.stem.removeprefix("test_")
        if file in ABOUT_THE_DATA_PLANE.get(folder, "").split():
            item.add_marker("no_cover")


def pytest_collection_finish() -> None:
    """Modules and tests live to the end: collections of garbage need not visit them."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Instead of pytest's own: its short name leaves room for sockets."""
    with tempfile.TemporaryDirectory(prefix="airlock-") as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def writer_of_log() -> Iterator[None]:
    """Where a command in this process has set another one, the next test has none."""
    yield
    log.write_by(log.to_library, log.DEBUG)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """A thread that a failed test left behind would keep the run from ending."""
    main = threading.main_thread()
    if any(t is not main and not t.daemon for t in threading.enumerate()):
        faulthandler.dump_traceback()
        os._exit(pytest.ExitCode.INTERNAL_ERROR)
