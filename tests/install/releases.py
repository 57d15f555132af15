# SPDX-License-Identifier: Apache-2.0
"""The Debian releases that users have."""

import pytest

from tests.support.profiles import STRESS

RELEASES = ["debian-12", "debian-13"]


def long_on(release: str) -> pytest.MarkDecorator:
    """Run a long test on this release only; make stress runs it on all of them."""
    releases = RELEASES if STRESS else [release]
    return pytest.mark.parametrize("release", releases, indirect=True)
