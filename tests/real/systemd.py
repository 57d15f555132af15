# SPDX-License-Identifier: Apache-2.0
"""This machine's systemd as process 1 of namespaces of its own.

It can change nothing of the machine: the file systems are read-only for it, but for
private ones. It has a cgroup of its own, and no units but ours and those in UNITS:
others would set up a machine, and empty its /tmp.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.real.processes import Process
from tests.real.programs import PROJECT, new_folder
from tests.support.users import SOURCE, python

PROGRAM = Path("/usr/lib/systemd/systemd")
THEIRS = Path("/usr/lib/systemd/system")
OURS = PROJECT / "systemd"

UNITS = ("systemd-journald.service", "systemd-journald.socket")
TARGETS = ("sysinit", "basic", "sockets", "multi-user", "shutdown")
"""Units of systemd that there are, and targets, which pull in nothing."""

BACK = 4242
GROUPS = {"kvm": 4241, "disk-back": BACK}
"""Groups that the machine may lack."""

BOOT = """
mkdir "$1/cgroups"
mount -t cgroup2 cgroup2 "$1/cgroups"
own=$1/cgroups/airlock-$$
mkdir "$own"
sh -euc '
    echo 0 > "$2/cgroup.procs"
    exec setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child \
        --cgroup --ipc --uts sh -euc "$3" sh "$1"
' sh "$1" "$own" "$2" || true
find "$own" -depth -type d -exec rmdir {} +
"""
"""Runs the next script in new namespaces and a new cgroup; removes that at the end."""

ENTER = """
mount --bind "$1/units" /usr/lib/systemd/system
mount --bind "$1/none" /usr/lib/systemd/system-generators
mount --bind "$1/program" /usr/local/sbin
mount --bind SOURCE /usr/local/sbin/src
mount --bind "$1/etc" /etc
mount --bind "$1/run" /run
for folder in /tmp /var /home /root /sys/fs/cgroup; do
    mount -t tmpfs tmpfs $folder
done
mkdir --mode=1777 /var/tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /dev
mkdir /dev/shm /dev/pts /dev/mqueue /dev/hugepages
for device in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0; do
    mknod --mode=666 /dev/${device%%:*} c $(echo ${device#*:} | tr : ' ')
done
mount -t devpts devpts /dev/pts
ln -s pts/ptmx /dev/ptmx
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
for folder in /proc/sys /sys /; do
    mount -o remount,bind,ro $folder
done
exec env -i container=airlock-test PATH="$PATH" PROGRAM --system \
    --unit=basic.target --log-target=journal --show-status=no
"""
"""Becomes systemd. The command is in the first folder in which systemd looks for it."""


def why_not() -> str:
    """The reason why there can't be one here; "": it can be."""
    if os.geteuid() != 0:
        return "only root can start systemd"
    if not PROGRAM.exists():
        return f"there is no {PROGRAM}"
    if "cgroup2" not in Path("/proc/filesystems").read_text():
        return "the kernel has no cgroup2"
    attempt = "unshare --mount --pid --fork mount -t cgroup2 cgroup2 /mnt"
    tried = subprocess.run(attempt.split(), capture_output=True, check=False)
    return "this root may not make namespaces" if tried.returncode else ""


class Systemd(Process):
    """A running systemd. `run` is its /run, as seen from here."""

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o755)
        for name in ("units", "none", "program", "run"):
            (folder / name).mkdir()
        for name in UNITS:
            shutil.copy(THEIRS / name, folder / "units")
        for name in TARGETS:
            (folder / "units" / f"{name}.target").write_text("[Unit]\n")
        self.run, self.etc = folder / "run", folder / "etc"
        shutil.copytree("/etc", self.etc, symlinks=True)
        shutil.rmtree(self.etc / "systemd")
        shutil.copytree(OURS, self.etc / "systemd" / "system")
        (self.etc / "vhost-airlock").mkdir()
        groups = self.etc / "group"
        text = groups.read_text()
        for name, number in GROUPS.items():
            if f"\n{name}:" not in text:
                text += f"{name}:x:{number}:\n"
        groups.write_text(text)
        _install(folder / "program")
        enter = ENTER.replace("SOURCE", shlex.quote(str(SOURCE)))
        enter = enter.replace("PROGRAM", str(PROGRAM))
        super().__init__(
            ["unshare", "--mount", "sh", "-euc", BOOT, "sh", str(folder), enter],
            folder / "systemd.log",
        )
        self.wait_until(lambda: self.inner != 0)
        self.wait_until((self.run / "systemd" / "private").exists)
        self("systemctl", "start", *UNITS)

    @property
    def inner(self) -> int:
        """The process number of systemd as seen from here; 0: it does not run yet."""
        pid = self.pid
        while children := _words(f"/proc/{pid}/task/{pid}/children"):
            pid = int(children[0])
            if _words(f"/proc/{pid}/comm") == ["systemd"]:
                return pid
        return 0

    def __call__(self, *command: str, status: int | None = 0) -> str:
        """Run a command where systemd is; returns what it prints."""
        enter = f"nsenter -t {self.inner} --mount --pid --cgroup --ipc --uts --"
        done = subprocess.run(
            [*enter.split(), *command],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        told = done.stdout + done.stderr
        assert status in (None, done.returncode), f"{command}: {told}"
        return told

    def configure(self, name: str, options: str, *settings: str) -> str:
        """Give an airlock its options, and settings beside those of its unit; returns
        the name of its service.
        """
        service = f"vhost-airlock@{name}.service"
        config = self.etc / "vhost-airlock" / f"{name}.conf"
        config.write_text(f"OPTIONS={options}\n")
        folder = self.etc / "systemd" / "system" / f"{service}.d"
        folder.mkdir()
        (folder / "test.conf").write_text("\n".join(["[Service]", *settings, ""]))
        self("systemctl", "daemon-reload")
        return service

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def await_value(self, unit: str, name: str, value: str) -> None:
        self.wait_until(lambda: self.show(unit, name) == value)

    def journal(self, unit: str) -> list[tuple[int, str]]:
        """The lines of a unit's processes, with their priorities."""
        self("journalctl", "--sync")
        lines = self("journalctl", "--output=json", f"_SYSTEMD_UNIT={unit}")
        records = [json.loads(line) for line in lines.splitlines() if line[:1] == "{"]
        return [(int(each["PRIORITY"]), each["MESSAGE"]) for each in records]

    def output(self) -> str:
        """What systemd says, and the journal."""
        if self.popen.poll() is not None:
            return super().output()
        return super().output() + self("journalctl", "--no-pager", status=None)

    def kill(self) -> None:
        """End it and everything in it, and wait until its cgroup is removed."""
        if self.pidfd >= 0 and self.inner:
            os.kill(self.inner, signal.SIGKILL)
            self.ended(10)
        super().kill()


@contextmanager
def systemd() -> Iterator[Systemd]:
    if reason := why_not():
        pytest.skip(reason)
    with new_folder() as folder, Systemd(folder) as running:
        yield running


def _words(path: str) -> list[str]:
    """The words in a file of /proc; none if its process is gone."""
    try:
        return Path(path).read_text().split()
    except OSError:
        return []


def _install(folder: Path) -> None:
    """Make the command, with a place for the package."""
    (folder / "src").mkdir()
    env, _, interpreter = python()
    command = f"{env} PYTHONPATH=/usr/local/sbin/src {interpreter} -m vhost_airlock"
    program = folder / "vhost-airlock"
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    program.chmod(0o755)
