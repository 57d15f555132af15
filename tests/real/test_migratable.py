# SPDX-License-Identifier: Apache-2.0
"""Which devices QEMU migrates, by the table in docs/migration.md.

QEMU runs without a guest here, and its back-ends lack a dirty log: so it migrates none
of them directly.
"""

from __future__ import annotations

import re

import pytest

from tests.real.programs import PROJECT
from tests.real.qmp import QmpError
from tests.real.qtest import QtestMachine
from tests.support.backs import ScriptedBack

DOCUMENT = (PROJECT / "docs" / "migration.md").read_text()
FATES = dict(re.findall(r"^\| `([a-z\d]+)` \| ([^|]*?) \|", DOCUMENT, re.M))
DEVICES = {
    "block": "vhost-user-blk-pci-non-transitional,chardev=front,num-queues=1",
    "scsi": "vhost-user-scsi-pci-non-transitional,chardev=front,num_queues=1",
    "net": "virtio-net-pci-non-transitional,netdev=net",
    "fs": "vhost-user-fs-pci,chardev=front,tag=tag",
    "vsock": "vhost-user-vsock-pci,chardev=front",
    "rng": "vhost-user-rng-pci,chardev=front",
    "gpio": "vhost-user-gpio-pci,chardev=front",
    "i2c": "vhost-user-i2c-pci,chardev=front",
    "sound": "vhost-user-snd-pci,chardev=front",
    "input": "vhost-user-input-pci,chardev=front",
}
EVENTS = {"capability": "events", "state": True}
BY_NATURE = "State blocked by non-migratable device"
NO_LOG = "vhost-user backend lacks VHOST_USER_PROTOCOL_F_LOG_SHMFD feature"
NO_STATE = "pre-save failed: vhost-user-fs-backend"
SAID = {
    ("yes", "direct"): NO_LOG,
    ("yes", "airlock"): "completed",
    ("if the back-end has `DEVICE_STATE`", "direct"): NO_LOG,
    ("if the back-end has `DEVICE_STATE`", "airlock"): NO_STATE,
    ("no", "direct"): BY_NATURE,
    ("no", "airlock"): BY_NATURE,
}


def fate(machine: QtestMachine, uri: str) -> str:
    """What QEMU says when it is to migrate there."""
    machine.qmp("migrate-set-capabilities", capabilities=[EVENTS])
    try:
        machine.qmp("migrate", uri=uri)
    except QmpError as error:
        return str(error)
    while (status := machine.qmp.wait_for("MIGRATION")["status"]) != "completed":
        if status == "failed":
            return str(machine.qmp("query-migrate")["error-desc"])
    return "completed"


@pytest.mark.parametrize("name", FATES)
def test_what_migrates(programs, folder, connect, via, name):
    front = connect(ScriptedBack())
    options = ["-chardev", f"socket,id=front,path={front}"]
    if name == "net":
        options += ["-netdev", "vhost-user,id=net,chardev=front"]
    log = folder / "qemu.log"
    with QtestMachine(programs, log, [DEVICES[name]], options) as machine:
        said = fate(machine, f"file:{folder / 'saved'}")
        assert SAID[FATES[name], via] in said, said


def test_messages_are_in_the_document():
    for message in (BY_NATURE, NO_LOG, NO_STATE):
        assert f"`{message}`" in DOCUMENT
