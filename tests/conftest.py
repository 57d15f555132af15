"""What all tests share: where real programs come from, and an end that is one."""

import faulthandler
import os
import threading

import pytest

from tests.real.programs import find


def pytest_report_header():
    found = find()
    if isinstance(found, str):
        return f"real programs: left out ({found})"
    return f"real programs: in {found.root}"


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """A thread that a failed test left behind would keep the run from ending."""
    main = threading.main_thread()
    if any(t is not main and not t.daemon for t in threading.enumerate()):
        faulthandler.dump_traceback()
        os._exit(pytest.ExitCode.INTERNAL_ERROR)
