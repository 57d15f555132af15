# SPDX-License-Identifier: Apache-2.0
"""`vhost-airlock-qemu-system-x86_64`: QEMU with isolation, under a name of its own.

For programs that start QEMU by its path and with their own arguments, as libvirt does
with an <emulator>. The name says which QEMU: links to it may have other names.
"""

from __future__ import annotations

import os
import sys

from .main import main

PREFIX = "vhost-airlock-"


def emulator() -> int:
    """Become the QEMU whose name this program has after the prefix."""
    name = os.path.basename(sys.argv[0])
    qemu = name.removeprefix(PREFIX)
    if qemu == name:
        print(f"{name}: the name does not begin with {PREFIX}", file=sys.stderr)
        return 2
    return main(["qemu", "--", qemu, *sys.argv[1:]])
