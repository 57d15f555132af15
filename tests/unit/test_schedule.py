# SPDX-License-Identifier: Apache-2.0
"""Several processes share the tests: those that measure time run alone, and last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2]
CONFTEST = """
import os, time
from pathlib import Path

import pytest

from tests.support.schedule import Scheduler

def pytest_xdist_make_scheduler(config, log):
    return Scheduler(config, log)

@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    began = time.monotonic()
    yield
    with (Path(__file__).parent / "log").open("a") as log:
        print(item.nodeid, began, time.monotonic(), os.getpid(), file=log)
"""
WHOLE_FILE = """
import pytest, time

pytestmark = pytest.mark.timing

def test_one():
    time.sleep(0.05)
"""
SOME = """
import pytest, time

def test_plain():
    time.sleep(0.2)

@pytest.mark.timing
@pytest.mark.parametrize("number", range(3))
def test_timed(number):
    time.sleep(0.05)

class TestClass:
    @pytest.mark.timing
    def test_timed_too(self):
        time.sleep(0.05)
"""
PLAIN = """
import time

def test_plain():
    time.sleep(0.1)

def test_plain_too():
    time.sleep(0.1)
"""


def spans(folder: Path, *options: str) -> dict[str, tuple[float, float, str]]:
    """Run all tests in a folder; when each began and ended, and in which process."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [
        "-o",
        f"pythonpath={PROJECT}",
        "-o",
        "markers=timing",
        f"--rootdir={folder}",
    ]
    done = subprocess.run(
        [*command, *options, folder], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stdout
    found = {}
    for line in (folder / "log").read_text().splitlines():
        name, began, ended, process = line.split()
        found[name] = float(began), float(ended), process
    return found


def make(folder: Path, **files: str) -> None:
    for name, text in {"conftest": CONFTEST, **files}.items():
        (folder / f"{name}.py").write_text(text)


def test_what_measures_time_runs_alone_and_last(tmp_path: Path) -> None:
    make(tmp_path, test_a=WHOLE_FILE, test_b=SOME, test_c=PLAIN, test_d=PLAIN)
    found = spans(tmp_path, "-n", "3")
    timed = {name: at for name, at in found.items() if "plain" not in name}
    others = [at for name, at in found.items() if name not in timed]
    assert (len(timed), len(others)) == (5, 5)
    assert max(end for _, end, _ in others) < min(start for start, *_ in timed.values())
    assert len({process for *_, process in timed.values()}) == 1
    assert len({process for *_, process in others}) > 1


def test_guests_come_first_in_two_processes_at_the_most(tmp_path: Path) -> None:
    guests = "# from tests.guest.machine\n" + PLAIN
    files = dict.fromkeys([f"test_g{number}" for number in range(4)], guests)
    make(tmp_path, **files, test_a=PLAIN, test_b=PLAIN, test_t=WHOLE_FILE)
    found = spans(tmp_path, "-n", "3")
    assert len(found) == 13
    first: dict[str, str] = {}
    for name, (_, _, process) in sorted(found.items(), key=lambda item: item[1]):
        first.setdefault(process, name)
    guests_at = {at[2] for name, at in found.items() if "test_g" in name}
    assert len(guests_at) == 2
    assert all("test_g" in first[process] for process in guests_at)


def test_there_may_be_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, test_a=WHOLE_FILE)
    assert len(spans(tmp_path, "-n", "2")) == 1
