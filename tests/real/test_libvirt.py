# SPDX-License-Identifier: Apache-2.0
"""A domain of Debian's libvirt, by the XML of docs/libvirt.md, with all its devices."""

import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

from tests.guest.devices import Device
from tests.guest.inside import files, net
from tests.guest.inside.agent import sh
from tests.guest.machine import Machine
from tests.real.airlock import airlock
from tests.real.backends import passt, virtiofsd_command
from tests.real.libvirt import (
    DOCUMENT,
    QEMU_GROUP,
    UUID,
    Domain,
    Host,
    example,
    of_the_tree,
)
from tests.real.network import Network
from tests.real.processes import Process
from tests.real.programs import Programs, need, new_folder
from tests.real.storage import Disk, storage_daemon
from vhost_airlock.peers.scan import search

MIB = 1 << 20
DRIVERS = Device((), ("virtio_blk", "virtiofs", "virtio_net"))
DESCRIPTOR = "Every shared folder of a host"
DEVICES = ["A disk", "A network card", "A shared folder", DESCRIPTOR]
DEVICES += ["One shared folder"]
MARKER = secrets.token_hex(16)


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


READ = "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /dev/{}"


@dataclass
class Scene:
    """A host with a running domain, its shared folders, and the back-ends of disks.

    `stack` holds the airlock of the first disk.
    """

    host: Host
    guest: Domain
    shares: list[Share]
    disks: list[Process]
    stack: ExitStack
    proxy: Process

    def restart(self, number: int) -> None:
        """End the airlock of the first disk by a signal, and start another one."""
        self.proxy.popen.send_signal(number)
        self.proxy.wait(timeout=10)
        self.stack.close()
        self.proxy = self.stack.enter_context(proxy(self.host, "disk"))

    def digest(self, image: str) -> str:
        """What READ says of a disk with this image."""
        data = (self.host.folder / image).read_bytes()
        return f"{sha256(data).hexdigest()}  -\n"

    def check(self, name: str, image: str) -> None:
        """Has the guest's disk of this name what is in the image?"""
        assert self.guest.sh(READ.format(name)) == self.digest(image)


def proxy(host: Host, name: str) -> AbstractContextManager[Process]:
    """The airlock of the back-end with this name."""
    back = host.folder / f"{name}-back.sock"
    return airlock(back, host.vm / f"{name}.sock", f"--socket-group={QEMU_GROUP}")


def disk(
    programs: Programs, folder: Path, name: str
) -> AbstractContextManager[tuple[Process, Path]]:
    """A back-end with random bytes."""
    image = folder / f"{name}.img"
    image.write_bytes(secrets.token_bytes(4 * MIB))
    return storage_daemon(programs, Disk(image), folder / f"{name}-back.sock")


def share(host: Host, name: str) -> Share:
    """A folder that is /srv/NAME for the host."""
    folder = host.folder / name
    folder.mkdir()
    host.run("mkdir", f"/srv/{name}")
    host.run("mount", "--bind", str(folder), f"/srv/{name}")
    return Share(folder)


@pytest.fixture(scope="module")
def scene(programs) -> Iterator[Scene]:
    with new_folder() as folder, ExitStack() as stack:
        enter = stack.enter_context
        host = enter(Host(need(keep=False), folder, of_the_tree(folder)))
        host.run("sh", "-euc", example(DESCRIPTOR, "sh"))
        shares = [share(host, name) for name in ("share", "other", "socket")]
        disks = [enter(disk(programs, folder, name))[0] for name in ("disk", "disk2")]
        network = enter(closing(Network(programs, folder)))
        enter(passt(programs, network, folder / "net-back.sock"))
        first = enter(ExitStack())
        running = first.enter_context(proxy(host, "disk"))
        enter(proxy(host, "disk2"))
        enter(proxy(host, "net"))
        command = virtiofsd_command(programs, folder / "socket", "--fd={listen-fd}")
        group = f"--socket-group={QEMU_GROUP}"
        enter(airlock(None, host.vm / "fs.sock", group, command=command))
        xml = "".join(map(example, DEVICES))
        words = f"marker={MARKER}"
        guest = enter(Domain(host, DRIVERS, xml, words))
        yield Scene(host, guest, shares, disks, first, running)


def test_devices_are_used(scene):
    for folder in scene.shares:
        folder.use(scene.guest)
    scene.check("vda", "disk.img")
    _, router, _ = scene.guest.call(net.configure)
    assert "3 packets received" in scene.guest.sh(f"ping -c 3 -i 0.1 {router}")


def test_no_back_end_has_the_guests_memory(scene):
    """I1. libvirt's own virtiofsd has process numbers of its own, too."""
    (qemu,) = scene.host.find("qemu-system-x86")
    started = scene.host.find("virtiofsd")
    assert len(started) == 2 * 2
    assert search(qemu, [MARKER.encode()]).found
    for back in [*started, *(one.pid for one in scene.disks)]:
        assert search(back, [MARKER.encode()]).found == ()
    spaces = [os.readlink(f"/proc/{back}/ns/pid_for_children") for back in started]
    assert os.readlink(f"/proc/{qemu}/ns/pid") not in spaces


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_airlock_is_started_again_while_the_disk_is_read(scene, number):
    reading = scene.guest.begin(sh, READ.format("vda"))
    scene.restart(number)
    assert reading.result() == scene.digest("disk.img")


def test_disk_comes_and_goes(scene):
    scene.host.vm.joinpath("disk.xml").write_text(example("A disk that comes later"))
    scene.host.run("virsh", "attach-device", "guest", "/run/vm/disk.xml")
    scene.guest.sh("until [ -e /dev/vdb ]; do sleep 0.1; done")
    scene.check("vdb", "disk2.img")
    scene.host.run("virsh", "detach-device", "guest", "/run/vm/disk.xml")
    scene.guest.sh("while [ -e /dev/vdb ]; do sleep 0.1; done")


def test_domain_is_not_saved_and_goes_on(scene):
    message = example("What the domain can do", "text").strip()
    assert message in scene.host.fails("virsh", "save", "guest", "/run/vm/saved")
    scene.check("vda", "disk.img")


def test_domain_reboots(scene):
    """The test is the guest's part, which turns the power off when it is asked to."""
    scene.host.run("virsh", "reboot", "guest", "--mode=acpi")
    scene.guest.begin(sh, "poweroff -f")
    scene.guest.booted()
    test_devices_are_used(scene)


def test_airlocks_of_libvirt_end_with_the_domain(scene):
    scene.host.run("virsh", "destroy", "guest")
    assert scene.host.find("virtiofsd") == []
    logs = scene.host.run("sh", "-c", "cat /var/log/libvirt/qemu/guest-*-virtiofsd.log")
    assert logs.count("Client connected") == 2
    assert "Traceback" not in logs


def test_apparmor_is_as_the_document_says(scene):
    """By libvirt's helper, which prints the rules for the domain."""
    said = scene.host.run(
        "sh",
        "-c",
        "/usr/lib/libvirt/virt-aa-helper --create --dryrun"
        f" --uuid libvirt-{UUID} < /run/vm/guest.xml",
    )
    assert '"/run/vm/net.sock" rw' in said
    assert '"/var/lib/libvirt/qemu/domain--1-guest/*" rw' in said
    assert "disk.sock" not in said
    assert "fs.sock" not in said


@pytest.mark.parametrize("name", ["root", "debian-12", "debian-13"])
def test_apparmor_profiles_are_as_the_document_says(name):
    profiles = need(name).path("/etc/apparmor.d")
    may_start = profiles.joinpath("usr.sbin.libvirtd").read_text()
    assert "  /usr/bin/* PUx,\n" in may_start
    assert "/usr/local" not in may_start
    (line,) = [line for line in DOCUMENT.splitlines() if "*.sock rw" in line]
    own = line.rpartition("/etc/apparmor.d/")[2]
    rules = profiles.joinpath("abstractions/libvirt-qemu").read_text()
    assert f"<{own}>" in rules
