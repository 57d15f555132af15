# SPDX-License-Identifier: Apache-2.0
"""Where the real programs are: in the Debians of tools/real-root and release-roots."""

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
REAL = PROJECT / ".real"


@dataclass(frozen=True)
class Programs:
    """How to run them. /tmp is the same folder for them and for us."""

    prefix: tuple[str, ...]
    root: Path
    cache: str
    """Folder for programs built by tests, as seen by those programs."""

    def __call__(self, *argv: str) -> list[str]:
        """The command line that runs a program there."""
        return [*self.prefix, *argv]

    def path(self, name: str) -> Path:
        """A file of theirs, as seen from here."""
        return self.root / name.lstrip("/")

    def find(self, name: str) -> str:
        """Where a program is for them. Where there is none, the test is skipped."""
        for folder in ("/usr/bin", "/usr/sbin", "/usr/libexec"):
            if self.path(f"{folder}/{name}").exists():
                return f"{folder}/{name}"
        pytest.skip(f"there is no {name} in {self.root}")

    def compile(self, source: Path, package: str) -> str:
        """Build a C program with their compiler and library: where it is for them.

        Its name carries a digest of the source, so each version is built once.
        """
        code = source.read_bytes()
        name = f"{source.stem}-{hashlib.sha256(code).hexdigest()[:12]}"
        if not self.path(f"{self.cache}/{name}").exists():
            gcc = "gcc -O2 -Wall -Wextra -Werror -x c -o $$ - -pthread"
            build = (
                f"mkdir -p {self.cache} && cd {self.cache} && "
                f"{gcc} $(pkg-config --cflags --libs {package}) && mv $$ {name}"
            )
            done = subprocess.run(
                self("sh", "-c", build), input=code, capture_output=True, timeout=60
            )
            assert done.returncode == 0, done.stderr.decode()
        return f"{self.cache}/{name}"


@contextmanager
def new_folder() -> Iterator[Path]:
    """A folder which the programs see too; its short name leaves room for sockets."""
    with tempfile.TemporaryDirectory(prefix="airlock-", dir="/tmp") as name:
        yield Path(name)


def find(name: str = "root", keep: bool = True) -> Programs | str:
    """The programs in .real/NAME, or why there are none.

    Without `keep`, each command has a root of its own, whose changes end with it.
    """
    root = REAL / name
    if os.environ.get("REAL") == "no":
        return "REAL=no"
    if os.geteuid() != 0:
        return f"entering .real/{name} needs root"
    if not (root / "ready").exists():
        tool = "real-root" if name == "root" else "release-roots"
        return f"no .real/{name}: tools/{tool} makes it"
    settings = [f"REAL_ROOT={root}", f"REAL_KEEP={'yes' if keep else 'no'}"]
    prefix = ("env", *settings, str(PROJECT / "tools" / "in-real-root"))
    return Programs(prefix, root, "/var/cache/vhost-airlock")


def need(name: str = "root", keep: bool = True) -> Programs:
    """The same. Where there are none, the test is skipped."""
    found = find(name, keep)
    if isinstance(found, str):
        pytest.skip(found)
    return found
