# SPDX-License-Identifier: Apache-2.0
"""The README's recipes for QEMU, word by word but for the paths in LOCAL.

QEMU's own firmware is the guest: it reads the disk, and asks the network for a system
to boot. It has no drivers for the folder and the vsock, which only have to be there.
"""

import json
import os
import re
import socket
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.real.network import Network
from tests.real.processes import Process, listening, run
from tests.real.programs import PROJECT, Programs
from tests.real.qmp import Qmp
from vhost_airlock.cli import stats_document

README = (PROJECT / "README.md").read_text()
QEMU, _, LISTENING = (
    README.partition("\n### QEMU\n")[2]
    .partition("\n### ")[0]
    .partition("\nWhen it is QEMU that listens")
)
ONE_COMMAND = README.partition("\n### QEMU, by one command\n")[2].partition("\n### ")[0]
HOTPLUG = (PROJECT / "docs" / "qemu.md").read_text()
HOTPLUG = HOTPLUG.partition("\n## A device that is plugged in later\n")[2]
HOTPLUG = HOTPLUG.partition("\n## ")[0]
NO_VM = README.partition("\n### No VM at all\n")[2].partition("\n### ")[0]
THEIRS = (
    *("qemu-storage-daemon", "qemu-system-x86_64", "qemu-img"),
    *("virtiofsd", "passt", "vhost-device-vsock"),
)
"""Programs that are in another root than the airlock."""
LOCAL = {"/usr/libexec/virtiofsd": "virtiofsd", "/srv/share": "share"}
PATIENCE = 60.0


def commands(text: str) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    return [each for block in blocks for each in block.strip().split("\n\n")]


def options(text: str) -> list[str]:
    """The indented lines outside of blocks, without comments."""
    text = re.sub(r"^```sh\n.*?^```", "", text, flags=re.M | re.S)
    return re.findall(r"^    (-.*?)(?: +# .*)?$", text, re.M)


def watched(command: str) -> str:
    """The command of an airlock, with the option for look()."""
    sides = r"--(?:socket-path|front-connect)=(\w+)"
    return re.sub(sides, r"--stats-path=\1.stats \g<0>", command)


class Kitchen:
    """A folder, and a network of its own, in which recipes are tried."""

    def __init__(self, programs: Programs, folder: Path, network: Network) -> None:
        self.folder = folder
        self.network = network
        self.stack = ExitStack()
        (folder / "bin").mkdir()
        for name in THEIRS:
            words = programs("env", f"--chdir={folder}", programs.find(name))
            self._write_program(name, " ".join(words))
        self._write_program("vhost-airlock", f"{sys.executable} -m vhost_airlock")
        (folder / "share").mkdir()
        (folder / "disk.img").write_bytes(bytes(1 << 20))

    def _write_program(self, name: str, command: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        path.chmod(stat.S_IRWXU)

    def argv(self, command: str) -> list[str]:
        for theirs, ours in LOCAL.items():
            command = command.replace(theirs, ours)
        path = f"PATH={self.folder}/bin:{os.environ['PATH']}"
        return ["env", f"--chdir={self.folder}", path, "sh", "-c", f"exec {command}"]

    def start(self, name: str, command: str, pass_fds: Sequence[int] = ()) -> Process:
        log = self.folder / f"{name}.log"
        with self.network.entered():
            process = Process(self.argv(command), log, pass_fds=pass_fds)
        return self.stack.enter_context(process)

    def serve(self, command: str) -> None:
        """Start a program, and wait until it listens."""
        paths = r"(?:--(?:socket|stats)(?:-path)?|addr\.path)=([^\s,]+)"
        sockets = re.findall(paths, command)
        program = self.start(f"{command.split()[0]}-{sockets[0]}", command)
        program.wait_until(
            lambda: all(listening(Path(name), program.pid) for name in sockets),
            PATIENCE,
        )

    def qemu(self, *lines: str, pass_fds: Sequence[int] = ()) -> Process:
        words = " ".join(lines)
        command = f"qemu-system-x86_64 -display none -nodefaults {words}"
        return self.start("qemu", command, pass_fds)

    def look(self, airlock: str) -> Any:
        """The status of an airlock, by the name of its socket."""
        return json.loads(stats_document.ask(str(self.folder / f"{airlock}.stats")))

    def completed(self, airlock: str, ring: int) -> bool:
        """Has the back-end completed a request of this ring?"""
        counters = self.look(airlock)["counters"].get(f"ring {ring}")
        return counters is not None and counters["completions"] > 0


@pytest.fixture
def kitchen(programs: Programs, folder: Path) -> Iterator[Kitchen]:
    with closing(Network(programs, folder)) as network:
        kitchen = Kitchen(programs, folder, network)
        with kitchen.stack:
            yield kitchen


def test_qemu_has_a_disk_a_folder_a_network_card_and_a_vsock(kitchen):
    for command in commands(QEMU):
        kitchen.serve(watched(command))

    server, client = commands(NO_VM)
    assert server in commands(QEMU)
    with kitchen.network.entered():
        brief = kitchen.argv(client.replace("bench", "bench -c 1000"))
        assert "Run completed" in run(brief, kitchen.folder / "img.log")
    assert kitchen.look("disk")["sessions"] == 1

    machine = kitchen.qemu(*options(QEMU))
    machine.wait_until(lambda: kitchen.completed("disk", 0), PATIENCE)
    machine.wait_until(lambda: kitchen.completed("net", 0), PATIENCE)
    for name in ("disk", "fs", "net", "vsock"):
        found = kitchen.look(name)
        assert (found["vmm_connected"], found["backend_connected"]) == (True, True)
        assert len(found["rings"]) > 1


def test_qemu_listens_and_has_a_disk(kitchen):
    chardev = re.search(r"`(-chardev .*?)`", LISTENING)
    assert chardev
    (dialler,) = commands(LISTENING)
    common, _, device = options(QEMU)[:3]
    kitchen.serve(commands(QEMU)[0])
    kitchen.serve(watched(dialler))
    machine = kitchen.qemu(common, chardev[1], device)
    machine.wait_until(lambda: kitchen.completed("disk", 0), PATIENCE)


def test_qemu_starts_its_airlock_itself(kitchen):
    (command,) = commands(ONE_COMMAND)
    kitchen.serve(commands(QEMU)[0])
    (kitchen.folder / "disk.stats").symlink_to("disk.sock")
    folders = f"--stats-dir={kitchen.folder} --control-dir={kitchen.folder}"
    command = command.replace(" -- ", f" {folders} -- ")
    machine = kitchen.start("qemu", f"{command} -display none -nodefaults")
    for name in ("disk.sock", "disk.control"):
        socket = kitchen.folder / name
        machine.wait_until(partial(listening, socket, machine.pid), PATIENCE)
    machine.wait_until(lambda: kitchen.completed("disk", 0), PATIENCE)


def test_disk_is_plugged_into_a_qemu_that_runs(kitchen):
    """It stands still meanwhile, and its firmware reads the disk then.

    The disk has an airlock of its own.
    """
    (airlock,) = commands(HOTPLUG)
    kitchen.serve(commands(QEMU)[0].replace("disk-back", "disk2-back"))
    kitchen.serve(watched(airlock))
    ours, theirs = socket.socketpair()
    with theirs:
        words = [*options(QEMU)[:1], *Qmp.options(theirs.fileno())]
        machine = kitchen.qemu("-S", *words, pass_fds=[theirs.fileno()])
    with closing(ours):
        monitor = Qmp(ours)
        plugged = re.findall(r"^    (.*)$", HOTPLUG, re.M)
        assert len(plugged) == 2
        for line in plugged:
            assert monitor("human-monitor-command", command_line=line) == ""
        assert kitchen.look("disk2")["vmm_connected"]
        monitor("cont")
        machine.wait_until(lambda: kitchen.completed("disk2", 0), PATIENCE)
