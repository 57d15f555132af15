# SPDX-License-Identifier: Apache-2.0
"""`vhost-airlock qemu` with the QEMU of a release, whose firmware reads a disk."""

import json
import sys

import pytest

from tests.real.processes import Process
from tests.real.programs import new_folder
from tests.real.serving import serving
from tests.support.airlocks import Airlocks
from tests.support.backs import ScriptedBack
from vhost_airlock.peers.disk import HEADER, SECTOR

pytestmark = pytest.mark.real


def test_firmware_reads_a_disk(release):
    back = ScriptedBack(config=(2048).to_bytes(60, "little"))  # so many sectors
    disk = {"driver": "vhost-user-blk-pci", "chardev": "c", "memory-isolation": True}
    with new_folder() as folder, serving(back, folder / "back.sock"):
        airlocks = Airlocks(folder)
        argv = release(
            "qemu-system-x86_64",
            *("-M", "q35,accel=tcg,memory-backend=ram", "-m", "64M"),
            *("-object", "memory-backend-memfd,id=ram,size=64M"),
            *("-nodefaults", "-display", "none", "-device", json.dumps(disk)),
            *("-chardev", f"socket,id=c,path={folder}/back.sock"),
        )
        command = [sys.executable, "-m", "vhost_airlock", "qemu", "--timeout=60", "--"]
        by = ["env", airlocks.environment, *command]
        with Process([*by, *argv], folder / "log") as machine:
            machine.wait_until(lambda: back.vrings[0].ring is not None, timeout=30)
            chain = back.take()
            assert HEADER.unpack(back.read(chain))[2] == 0, "it reads the first sector"
            back.complete(chain, bytes(SECTOR))
            keeper = airlocks.keeper()
            assert machine.stop() == 0
            airlocks.assert_end(keeper)
