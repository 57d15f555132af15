# SPDX-License-Identifier: Apache-2.0
"""The README's recipe for three users, with QEMU and qemu-storage-daemon.

Word by word, but for the names of users, which are numbers here, the program that
starts a command as a user, and the paths.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

from tests.real.processes import Process, listening
from tests.real.programs import PROJECT, Programs
from tests.real.qtest import QtestMachine, VirtioDevice
from tests.support.users import as_user, python
from vhost_airlock.peers.disk import HEADER, BlkType
from vhost_airlock.peers.scan import search

README = (PROJECT / "README.md").read_text()
RECIPE = README.partition("\n### Three users\n")[2].partition("\n### ")[0]
USERS = {"vmm": 4301, "airlock": 4302, "disk": 4303}
GROUPS = {"airlock": (USERS["vmm"], USERS["disk"])}
"""Groups of which a user is a member beside its own."""

LOOK = """
import mmap, os, socket, sys
marker, front, *pids = sys.argv[1:]

def find(pid):
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        if os.readlink(path).startswith("/memfd:memory-backend"):
            with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
                return memory.find(bytes.fromhex(marker)) >= 0

def attempt(words, action, *arguments):
    try:
        print(words, action(*arguments) is not False)
    except PermissionError:
        print(words, False)

for pid in pids:
    attempt("finds", find, pid)
    attempt("maps", os.listdir, f"/proc/{pid}/map_files")
    attempt("opens", open, f"/proc/{pid}/mem", "r+b")
attempt("connects", socket.socket(socket.AF_UNIX).connect, front)
"""
"""Tries to get at the memory of a guest, as the user that runs it."""


def test_recipe_is_for_these_users() -> None:
    assert "usermod --append --groups vmm,disk airlock\n" in RECIPE
    assert set(re.findall(r"(?:runuser -u|-o|-g) (\w+)", RECIPE)) == {*USERS}


class Trial:
    """The recipe in a folder."""

    def __init__(self, programs: Programs, folder: Path) -> None:
        self.programs = programs
        self.folder = folder
        (block,) = re.findall(r"^```sh\n(.*?)^```", RECIPE, re.M | re.S)
        setup, *commands = block.replace("/run/", f"{folder}/").strip().split("\n\n")
        for line in setup.splitlines()[1:]:
            subprocess.run([*map(self._number, shlex.split(line))], check=True)
        self.commands = [shlex.split(command) for command in commands]

    def _number(self, word: str) -> str:
        return str(USERS.get(word, word))

    def start(self, command: list[str]) -> Process:
        """Start `runuser -u USER -- PROGRAM ...`."""
        assert command[:2] == ["runuser", "-u"]
        user, _, *argv = command[2:]
        if argv[0] == "vhost-airlock":
            argv[0:1] = [*python(), "-m", "vhost_airlock"]
            argv = [*self.prefix(user), *argv]
        else:
            argv = self.as_user(user)(*argv)
        named = [re.sub("(--socket-group)=vmm", rf"\1={USERS['vmm']}", w) for w in argv]
        named = [word.replace("disk.img", f"{self.folder}/disk.img") for word in named]
        return Process(named, self.folder / f"{user}.log")

    def prefix(self, user: str) -> list[str]:
        return as_user(USERS[user], *GROUPS.get(user, ()))

    def as_user(self, user: str) -> Programs:
        """The real programs, started as this user."""
        return replace(
            self.programs, prefix=(*self.programs.prefix, *self.prefix(user))
        )


def user_of(process: Process) -> int:
    return os.stat(f"/proc/{process.pid}/task").st_uid


def test_three_users(programs: Programs, folder: Path) -> None:
    """The guest writes and reads; the back-end's user can't get at its memory."""
    folder.chmod(0o755)
    image = folder / "disk.img"
    image.write_bytes(bytes(1 << 20))
    os.chown(image, USERS["disk"], USERS["disk"])
    trial = Trial(programs, folder)
    back, front = folder / "disk" / "back.sock", folder / "airlock" / "disk.sock"
    chardev = f"socket,id=disk,path={front}"
    assert chardev.replace(f"{folder}/", "/run/") in RECIPE
    device = "vhost-user-blk-pci-non-transitional,chardev=disk"
    with (
        trial.start(trial.commands[0]) as daemon,
        trial.start(trial.commands[1]) as proxy,
    ):
        daemon.wait_until(lambda: listening(back))
        proxy.wait_until(lambda: listening(front))
        found = front.stat()
        assert (found.st_uid, found.st_gid) == (USERS["airlock"], USERS["vmm"])
        assert stat.S_IMODE(found.st_mode) == 0o660
        with QtestMachine(
            trial.as_user("vmm"), folder / "qemu.log", [device], ["-chardev", chardev]
        ) as machine:
            marker, written = secrets.token_bytes(16), secrets.token_bytes(512)
            for place in range(0x1000, 640 << 10, 0x10000):
                machine.write(place, marker)
            disk = VirtioDevice(machine)
            disk.negotiate((1 << 64) - 1)
            disk.add_queue(0)
            disk.start()
            request = HEADER.pack(BlkType.OUT, 0, 1) + written
            assert disk.request(0, request, writable=1) == b"\0"
            request = HEADER.pack(BlkType.IN, 0, 1)
            assert disk.request(0, request, writable=513) == written + b"\0"
            assert image.read_bytes()[512:1024] == written
            assert [*map(user_of, (machine, proxy, daemon))] == [*USERS.values()]

            def look(user: str) -> list[str]:
                pids = map(str, (machine.pid, proxy.pid))
                argv = [*trial.prefix(user), *python(), "-c", LOOK]
                argv += [marker.hex(), str(front), *pids]
                done = subprocess.run(argv, stdout=subprocess.PIPE, check=True)
                return done.stdout.decode().splitlines()

            nothing = ["finds False", "maps False", "opens False"]
            assert look("vmm")[0] == "finds True", "this is how it is done"
            assert look("disk") == [*nothing, *nothing, "connects False"]
            assert search(daemon.pid, [marker]).found == ()
            disk.reset()
        assert proxy.stop() == 0
        assert "isolated in vain" not in proxy.output()
        assert not front.exists()
