# SPDX-License-Identifier: Apache-2.0
"""A host with Debian's libvirt, and domains on it.

The host is a Debian of .real with process numbers, a network and changes of its own,
which end with it. The package is installed there, or run from the tree: then the
outside's root is in the host's folder in /tmp.
"""

import contextlib
import re
import secrets
import socket
import sys
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Self

from tests.guest.devices import Device
from tests.guest.initramfs import kernel
from tests.guest.inside import files
from tests.guest.lines import Lines
from tests.guest.machine import (
    BOOT_WORDS,
    PATIENCE,
    SLOW,
    Call,
    Machine,
    initramfs_for,
)
from tests.real.processes import Process, listening, run
from tests.real.programs import PROJECT, Programs
from tests.real.storage import Disk, storage_daemon

MIB = 1 << 20
DRIVERS = Device((), ("virtio_blk", "virtiofs", "virtio_net"))

QEMU_GROUP = 64055
"""Debian's group libvirt-qemu has the same number everywhere."""

DOCUMENT = (PROJECT / "docs" / "libvirt.md").read_text()

UUID = "5bd80d5c-5d2a-4d5b-9a67-2a1f7a9d4c11"
PORT = "<controller type='pci' model='pcie-root-port'/>"

QEMU_CONF = """stdio_handler = "file"
namespaces = []
cgroup_controllers = []
"""
"""No virtlogd runs, libvirt 9 can't make a private /dev of this one, and the domains of
two hosts would be in one cgroup.
"""

LIBVIRTD_CONF = """host_uuid = "{uuid}"
listen_tls = 0
listen_tcp = 1
auth_tcp = "none"
"""
"""Hosts on one machine would have the same number, and libvirt moves no domain then."""

OUTSIDE = """
mkdir "$1/outside"
mount --rbind / "$1/outside"
shift
exec "$@"
"""
"""The folder is in /tmp, and so in the root too."""

START = """
mount -t proc proc /proc
mount -t proc proc "$1/outside/proc"
hostname "$2"
cp -R "$1/host/." /
mkdir /run/vm
mount --bind "$1/vm" /run/vm
busybox ip link set lo up
if [ -e /dev/kvm ]; then
    install -m 0 /dev/null /run/no-kvm
    mount --bind /run/no-kvm /dev/kvm
fi
echo "127.0.0.1 localhost $2" > /etc/hosts
libvirtd --listen &
wait
"""
"""The first process of the host: it has to reap the processes that others leave.

A /dev/kvm that root may use and libvirt-qemu not would make libvirt look at QEMU again
and again. Without /etc/hosts, libvirt waits 40 s for a server that knows the host's
name.
"""

CPU_MODEL = "".join(
    [
        "<cpu mode='maximum'>",
        *(f"<feature policy='disable' name='{name}'/>" for name in SLOW),
        "</cpu>",
    ]
)

START_GUEST = "virsh define guest.xml; virsh start guest"

STAND_IN = """#!/bin/sh
export PYTHONPATH={source} VIRTIOFSD={folder}/host/usr/libexec/real-virtiofsd
exec chroot {folder}/outside {python} -c 'import sys
from vhost_airlock.cli.virtiofsd import virtiofsd
sys.argv[0] = "/usr/bin/vhost-airlock-virtiofsd"
sys.exit(virtiofsd())' "$@"
"""
"""vhost-airlock-virtiofsd, run by the outside's Python from the tree."""

REAL = """#!/bin/sh
exec nsenter --mount=/proc/self/ns/mnt /usr/libexec/virtiofsd "$@"
"""
"""The host's virtiofsd, run from the outside."""


def of_the_tree(folder: Path) -> dict[str, str]:
    """The files of a host in this folder on which the package is not installed."""
    python = Path(sys.executable).absolute()
    stand_in = STAND_IN.format(source=PROJECT / "src", folder=folder, python=python)
    return {
        "usr/bin/vhost-airlock-virtiofsd": stand_in,
        "usr/libexec/real-virtiofsd": REAL,
    }


def example(title: str, language: str = "xml") -> str:
    """The first example of docs/libvirt.md below a heading."""
    pattern = rf"^#+ {title}$(?:(?!^#).)*?^```{language}\n(.*?)^```"
    found = re.search(pattern, DOCUMENT, re.M | re.S)
    assert found, title
    return found[1]


def children(number: int) -> list[int]:
    """The numbers of a process's children."""
    lists = Path(f"/proc/{number}/task").glob("*/children")
    return [int(child) for each in lists for child in each.read_text().split()]


class Host(Process):
    """libvirtd, ready for virsh. `vm` is its /run/vm, where all may connect."""

    def __init__(
        self,
        programs: Programs,
        folder: Path,
        files: Mapping[str, str],
        name: str = "here",
    ) -> None:
        programs.find("libvirtd")
        self.programs = programs
        self.folder = folder
        self.name = name
        self.vm = folder / "vm"
        self.vm.mkdir()
        for path in (folder, self.vm):
            path.chmod(0o755)
        settings = {
            "etc/libvirt/qemu.conf": QEMU_CONF,
            "etc/libvirt/libvirtd.conf": LIBVIRTD_CONF.format(uuid=uuid.uuid4()),
        }
        for place, text in {**settings, **files}.items():
            path = folder / "host" / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        space = ("unshare", "--mount", "--propagation", "private")
        spaces = (*space, "--pid", "--net", "--uts", "--fork", "--kill-child")
        argv = [
            *(*space, "sh", "-euc", OUTSIDE, "sh", str(folder)),
            *programs(*spaces, "sh", "-euc", START, "sh", str(folder), name),
        ]
        super().__init__(argv, folder / "libvirtd.log")
        try:
            self.wait_until(self._ready)
        except BaseException:
            self.kill()
            raise

    def _ready(self) -> bool:
        try:
            return listening(Path("/run/libvirt/libvirt-sock"), self.first)
        except (OSError, IndexError):  # there is no first process yet
            return False

    @property
    def first(self) -> int:
        """The number of the host's first process, out here."""
        return children(self.pid)[0]

    def command(self, *argv: str) -> list[str]:
        """The command line that runs a program on the host."""
        spaces = ("--mount", "--pid", "--net", "--uts")
        return ["nsenter", f"--target={self.first}", *spaces, "--", *argv]

    def run(self, *argv: str) -> str:
        """Run a program that has to succeed: its output."""
        return run(self.command(*argv), self.folder / "command.log")

    def connect(self, other: "Host") -> None:
        """Give both a cable between them, and each the other's address by its name."""
        ends = [(self, other, "192.0.2.1"), (other, self, "192.0.2.2")]
        one, two = (f"name eth0 netns {host.first}" for host, _, _ in ends)
        cable = f"ip link add {one} type veth peer {two}"
        run(self.programs(*cable.split()), self.folder / "command.log")
        for host, peer, address in ends:
            host.run(
                "sh",
                "-euc",
                f"ip address add {address}/24 dev eth0; ip link set eth0 up"
                f"; sed -i 's/ {host.name}$//' /etc/hosts",
            )
            for each in (host, peer):
                each.run("sh", "-c", f"echo {address} {host.name} >> /etc/hosts")

    def find(self, name: str) -> list[int]:
        """The numbers, out here, of the host's processes with this name."""
        found = []
        left = [self.first]
        while left:
            number = left.pop()
            with contextlib.suppress(OSError):  # it has ended
                left += children(number)
                if Path(f"/proc/{number}/comm").read_text().strip() == name:
                    found.append(number)
        return found

    def fails(self, *argv: str) -> str:
        """Run a program that has to fail: its output."""
        with Process(self.command(*argv), self.folder / "command.log") as process:
            assert process.wait(60) != 0, process.describe()
            return process.output()


class Domain(Machine):
    """A domain with our init, running and ready for calls, started by a script.

    The script finds its XML in the folder in which it runs, as guest.xml.
    """

    def __init__(
        self,
        host: Host,
        devices: str,
        words: str = "",
        script: str = START_GUEST,
    ) -> None:
        self.host = host
        self.script = script
        self.initrd = host.vm / "initramfs"
        self.initrd.write_bytes(initramfs_for(host.programs, DRIVERS))
        host.vm.joinpath("guest.xml").write_text(f"""<domain type='qemu'>
  <name>guest</name>
  <uuid>{UUID}</uuid>
  <memory unit='MiB'>256</memory>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel(host.programs)}</kernel>
    <initrd>/run/vm/initramfs</initrd>
    <cmdline>{BOOT_WORDS} {words}</cmdline>
  </os>
  <features><acpi/></features>
  {CPU_MODEL}
  {example("libvirt")}
  <devices>
    {devices}
    <controller type='pci' model='pcie-root'/>
    {PORT * 8}
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='file'><source path='/run/vm/console.log'/></serial>
    <serial type='unix'><source mode='connect' path='/run/vm/agent.sock'/></serial>
  </devices>
</domain>""")

    def __enter__(self) -> Self:
        self.agent = self._run(self.script, self.host)
        self.booted()
        return self

    def _run(self, script: str, there: Host) -> Lines:
        """Run a script that starts QEMU there: the way to the agent."""
        path = there.vm / "agent.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            path.chmod(0o666)
            listener.listen()
            listener.settimeout(PATIENCE)
            self.host.run("sh", "-euc", f"cd /run/vm\n{script}")
            agent = Lines(listener.accept()[0])
        path.unlink()
        return agent

    def can_boot_at(self, host: Host) -> None:
        """QEMU finds there all that the XML names, also if it boots nothing."""
        host.vm.joinpath(self.initrd.name).hardlink_to(self.initrd)

    def goes_on_after(self, script: str, there: Host | None = None) -> None:
        """Run a script that ends QEMU and starts another one for the same machine, here
        or there.
        """
        there = there or self.host
        agent = self._run(script, there)
        agent.take_over(self.agent)
        self.agent.close()
        self.agent, self.host = agent, there

    def __exit__(self, *error: object) -> None:
        self.agent.close()

    def booted(self) -> None:
        """Wait until the machine is ready for calls."""
        Call[str](self, "boot").result()

    def describe(self) -> str:
        return self.host.describe()


@dataclass(frozen=True)
class Share:
    """A folder that the guest has by its tag, which is the folder's name."""

    folder: Path

    def use(self, guest: Machine) -> None:
        """A file goes each way."""
        tag = self.folder.name
        self.folder.joinpath("from host").write_text(tag)
        guest.sh(f"mkdir -p /mnt/{tag} && mount -t virtiofs {tag} /mnt/{tag}")
        assert guest.sh(f"cat '/mnt/{tag}/from host'") == tag
        guest.call(files.write_big, f"/mnt/{tag}/big", 1, MIB)
        files.check_big(str(self.folder / "big"), 1, MIB)


def disk(
    programs: Programs, folder: Path, name: str, image: Path | None = None
) -> AbstractContextManager[tuple[Process, Path]]:
    """A back-end with random bytes, or with an image that another one has too."""
    locking = "off" if image else "auto"
    if image is None:
        image = folder / f"{name}.img"
        image.write_bytes(secrets.token_bytes(4 * MIB))
    export = Disk(image, locking=locking)
    return storage_daemon(programs, export, folder / f"{name}-back.sock")


READ = "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /dev/{}"
"""A guest's command that reads a whole disk."""


def digest(image: Path) -> str:
    """The output of READ for the disk with this image."""
    return f"{sha256(image.read_bytes()).hexdigest()}  -\n"


def check_disk(guest: Machine, name: str, image: Path) -> None:
    assert guest.sh(READ.format(name)) == digest(image)


def share(host: Host, name: str) -> Share:
    """A new folder that is /srv/NAME for the host."""
    folder = host.folder / name
    folder.mkdir()
    mount(host, folder)
    return Share(folder)


def mount(host: Host, folder: Path) -> None:
    """Let the host have this folder as /srv/NAME."""
    host.run("mkdir", f"/srv/{folder.name}")
    host.run("mount", "--bind", str(folder), f"/srv/{folder.name}")
