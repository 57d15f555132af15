# SPDX-License-Identifier: Apache-2.0
"""Compiles the data plane. Everything else about the package is in pyproject.toml."""

import os
import platform
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

BUILD = os.environ.get("CFLAGS", "") + os.environ.get("CC", "")

FLAGS = ["-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unused-parameter"]
FLAGS += ["-g1"]  # for the lines of a core dump: the rest of -g takes time to compile
HOT = {"bounce", "guest_split", "pool", "regions", "shadow_split", "step"}
"""The modules through which each request goes. -O3 takes time to compile, too."""

LINK_FLAGS = ["-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack"]
"""Tables of functions can't be changed after the start: all are looked up then."""

HARDENING = ["-fstack-protector-strong", "-fstack-clash-protection"]
"""This code faces both attackers: a flaw in it shall be hard to use."""
if platform.machine() == "x86_64":
    HARDENING += ["-fcf-protection=full"]
if "--coverage" not in BUILD and "-fsanitize" not in BUILD:
    # The checked functions need optimisation, and hide accesses from the sanitizers.
    HARDENING += ["-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]


def optimization(module: str) -> str:
    if "--coverage" in BUILD:
        return "-O0"  # what tools/coverage counts are the lines as they are written
    return "-O3" if module in HOT else "-O2"


modules = [
    Extension(
        ".".join(path.relative_to("src").with_suffix("").parts),
        [str(path)],
        depends=["setup.py"],
        extra_compile_args=[optimization(path.stem), *FLAGS, *HARDENING],
        extra_link_args=LINK_FLAGS,
    )
    for path in sorted(Path("src/vhost_airlock").rglob("*.pyx"))
]
if not modules:
    raise SystemExit("setup.py: src/vhost_airlock has no .pyx file to compile")

setup(
    ext_modules=cythonize(
        modules,
        build_dir="build",
        nthreads=os.cpu_count(),
        quiet=True,
        include_path=["src"],
        compiler_directives={
            "language_level": 3,
            "auto_pickle": False,
            "autotestdict": False,
        },
    ),
    options={"build_ext": {"parallel": os.cpu_count()}},
)
