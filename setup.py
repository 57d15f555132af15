# SPDX-License-Identifier: Apache-2.0
"""Compiles the data plane. Everything else about the package is in pyproject.toml."""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

FLAGS = ["-O3", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unused-parameter"]
if "--coverage" in os.environ.get("CFLAGS", ""):
    FLAGS[0] = "-O0"  # what tools/coverage counts are the lines as they are written

modules = [
    Extension(
        ".".join(path.relative_to("src").with_suffix("").parts),
        [str(path)],
        extra_compile_args=FLAGS,
    )
    for path in sorted(Path("src/vhost_airlock").rglob("*.pyx"))
]

setup(
    ext_modules=cythonize(
        modules,
        build_dir="build",
        include_path=["src"],
        compiler_directives={
            "language_level": 3,
            "auto_pickle": False,
            "autotestdict": False,
        },
    ),
    options={"build_ext": {"parallel": os.cpu_count()}},
)
