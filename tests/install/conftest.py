# SPDX-License-Identifier: Apache-2.0
"""Tests of what users install, on the Debian releases that users have."""

import pytest

from tests.real.programs import Programs, find


@pytest.fixture(params=["debian-12", "debian-13"])
def release(request: pytest.FixtureRequest) -> Programs:
    """A Debian whose changes end with each command."""
    found = find(request.param, keep=False)
    if isinstance(found, str):
        pytest.skip(found)
    return found
