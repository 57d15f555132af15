# SPDX-License-Identifier: Apache-2.0
"""The preflight names the packages that a build needs and the machine lacks: on Debian
12 and 13, from which packages are removed for real, and elsewhere.
"""

import os
import re
import shutil
import subprocess

import pytest

from tests.real.processes import run
from tests.real.programs import PROJECT, new_folder

pytestmark = pytest.mark.real

README = (PROJECT / "README.md").read_text()

PYTHON = """python$(python3 -c 'import sys; print("3.%d" % sys.version_info.minor)')"""
STEPS = {
    "": "",
    "libseccomp2": "missing: libseccomp.so.2. On Debian: apt install libseccomp2"
    " (this build goes on without)",
    "libc6-dev": "missing: the C library's headers, libseccomp.so.2."
    " On Debian: apt install libc6-dev libseccomp2",
    f"lib{PYTHON}-dev {PYTHON}-venv": "missing: the C library's headers,"
    " ensurepip, Python.h, libseccomp.so.2."
    " On Debian: apt install libc6-dev python3-venv python3-dev libseccomp2",
    "$(dpkg-query --show --showformat '${Package} ' 'gcc*')": "missing:"
    " a C compiler (x86_64-linux-gnu-gcc), the C library's headers,"
    " ensurepip, Python.h, libseccomp.so.2."
    " On Debian: apt install gcc libc6-dev python3-venv python3-dev libseccomp2",
}
"""Packages that are removed, one step after the other, and what is told then."""


def test_preflight_names_what_is_missing(release):
    script = ""
    for packages in STEPS:
        if packages:
            script += f"dpkg --purge --force-all {packages} >purge.log 2>&1\n"
        script += './preflight 2>&1; echo "status $?"\n'
    with new_folder() as folder:
        shutil.copy(PROJECT / "tools" / "preflight", folder)
        argv = release("sh", "-uc", f"cd {folder}\n{script}")
        told = run(argv, folder / "log")
    wanted = ""
    for text, status in zip(STEPS.values(), [0, 0, 1, 1, 1], strict=True):
        wanted += f"preflight: {text}\n" if text else ""
        wanted += f"status {status}\n"
    assert told == wanted


def test_preflight_without_apt_wants_all_of_python(release):
    """Elsewhere tools/bootstrap can unpack nothing in place of what is missing."""
    script = f"""
        rm /usr/bin/apt-get
        dpkg --purge --force-all {PYTHON}-venv > purge.log 2>&1
        ./preflight 2>&1
        echo $?
    """
    with new_folder() as folder:
        shutil.copy(PROJECT / "tools" / "preflight", folder)
        told = run(release("sh", "-uc", f"cd {folder}\n{script}"), folder / "log")
    line = "preflight: missing: ensurepip. On Debian: apt install python3-venv"
    assert told == f"{line}\n1\n"


@pytest.mark.parametrize(
    ("program", "line"),
    [
        (
            "./none",
            "missing: Python (./none), ensurepip, Python.h, libseccomp.so.2. On Debian:"
            " apt install python3 python3-venv python3-dev libseccomp2",
        ),
        ("./old", "Python 3.11 or later is needed; here: Python 3.10.12"),
    ],
)
def test_preflight_wants_python_3_11(program, line, tmp_path):
    """Without any, the other packages are named at once too."""
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.10.12\n')
    old.chmod(0o755)
    done = subprocess.run(
        [PROJECT / "tools" / "preflight"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": program},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == f"preflight: {line}\n"


def test_make_deb_names_the_packages_of_the_readme(tmp_path):
    row = re.search(r"^\| `make deb` .*; takes (.*) \|$", README, re.M)
    assert row
    packages = re.findall(r"`(.*?)`", row[1])
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    done = subprocess.run(
        ["/bin/sh", PROJECT / "tools" / "deb"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    line = f"dpkg-buildpackage. On Debian: apt install {' '.join(packages)}"
    assert done.stderr == f"deb: missing: {line}\n"
