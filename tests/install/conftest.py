# SPDX-License-Identifier: Apache-2.0
"""Tests of what users install, on the Debian releases that users have."""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.install.releases import RELEASES
from tests.real.programs import PROJECT, Programs, find, new_folder
from vhost_airlock import __version__


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> Programs:
    """A Debian whose changes end with each command."""
    found = find(request.param, keep=False)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@dataclass
class Package:
    """The package for a Debian, which sees it in this folder."""

    release: Programs
    folder: Path
    name: str


@pytest.fixture
def package(release: Programs) -> Iterator[Package]:
    subprocess.run([PROJECT / "tools" / "deb", release.root.name], check=True)
    name = f"vhost-airlock_{__version__}_amd64.deb"
    with new_folder() as folder:
        shutil.copy(PROJECT / "dist" / release.root.name / name, folder)
        yield Package(release, folder, name)
