# SPDX-License-Identifier: Apache-2.0
"""`vhost-airlock attack` on qemu-storage-daemon: what holds behind an airlock only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.real.airlock import airlock
from tests.real.storage import Disk, storage_daemon
from vhost_airlock.cli.attack import GUEST

ATTACK = [sys.executable, "-m", "vhost_airlock", "attack", "--json", "--timeout=20"]

DEADLY = [
    "address-in-hole",
    "head-beyond",
    "index-jump",
    "loop-of-one",
    "next-beyond",
    "readable-after-writable",
    "table-empty",
    "table-next-beyond",
    "zero-length",
]
"""Attacks that end the connection with all its rings each time, when direct."""


def attacks(path: Path, *names: str) -> dict[str, dict[str, Any]]:
    command = [*ATTACK, f"--as-guest={path}", *names]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=100, check=False)
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["held"] else 1)
    return {each["name"]: each for each in found["attacks"]}


def disk(folder: Path) -> Disk:
    image = folder / "disk.img"
    image.write_bytes(bytes(4 << 20))
    return Disk(image, queues=2)


def test_guest_can_not_end_the_device_behind_an_airlock(programs, folder):
    with (
        storage_daemon(programs, disk(folder), folder / "back.sock") as (_, back),
        airlock(back, folder / "front.sock", "--drain-timeout=0.3"),
    ):
        found = attacks(folder / "front.sock")
    assert [each for each in found.values() if not each["held"]] == []
    assert list(found) == [each.name for each in GUEST]


def test_guest_can_end_the_device_directly(programs, folder):
    with storage_daemon(programs, disk(folder), folder / "back.sock") as (_, back):
        found = attacks(back, *DEADLY)
    assert not any(each["held"] for each in found.values())
    assert {name: each["verdict"] for name, each in found.items()} == dict.fromkeys(
        DEADLY, "connection lost"
    )
