# SPDX-License-Identifier: Apache-2.0
"""A domain of Debian's libvirt, by the XML of docs/libvirt.md, with all its devices."""

import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.guest.inside import files, net
from tests.guest.inside.agent import sh
from tests.real.airlock import airlock
from tests.real.backends import passt, virtiofsd_command
from tests.real.libvirt import (
    DOCUMENT,
    QEMU_GROUP,
    READ,
    UUID,
    Domain,
    Host,
    Share,
    check_disk,
    digest,
    disk,
    example,
    mount,
    of_the_tree,
    share,
)
from tests.real.network import Network
from tests.real.processes import Process
from tests.real.programs import Programs, need, new_folder
from vhost_airlock.peers.scan import search

DESCRIPTOR = "Every shared folder of a host"
DEVICES = ["A disk", "A network card", "A shared folder", DESCRIPTOR]
DEVICES += ["One shared folder"]
MARKER = secrets.token_hex(16)


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

    def image(self, name: str) -> Path:
        return self.host.folder / f"{name}.img"

    def check(self) -> None:
        """Disk, folders, open files and network are as they were."""
        guest = self.guest
        check_disk(guest, "vda", self.image("disk"))
        guest.call(files.check_held)
        for each in self.shares:
            tag = each.folder.name
            assert guest.sh(f"cat '/mnt/{tag}/from host'") == tag
        assert "1 packets received" in guest.sh("ping -c 1 $(cut -d' ' -f2 /tmp/lease)")

    def restart(self, number: int) -> None:
        """End the airlock of the first disk by a signal, and start another one."""
        self.proxy.popen.send_signal(number)
        self.proxy.wait(timeout=10)
        self.stack.close()
        self.proxy = self.stack.enter_context(proxy(self.host, "disk"))


def proxy(host: Host, name: str) -> AbstractContextManager[Process]:
    """The airlock of the back-end with this name."""
    back = host.folder / f"{name}-back.sock"
    return airlock(back, host.vm / f"{name}.sock", f"--socket-group={QEMU_GROUP}")


@contextmanager
def others(programs: Programs, host: Host, folder: Path) -> Iterator[None]:
    """The back-ends of a host that are none of a disk, with their airlocks."""
    command = virtiofsd_command(programs, folder, "--fd={listen-fd}")
    group = f"--socket-group={QEMU_GROUP}"
    with (
        closing(Network(programs, host.folder)) as network,
        passt(programs, network, host.folder / "net-back.sock"),
        proxy(host, "net"),
        airlock(None, host.vm / "fs.sock", group, command=command),
    ):
        yield


@pytest.fixture(scope="module")
def scene(programs) -> Iterator[Scene]:
    with new_folder() as folder, ExitStack() as stack:
        enter = stack.enter_context
        host = enter(Host(need(keep=False), folder, of_the_tree(folder)))
        host.run("sh", "-euc", example(DESCRIPTOR, "sh"))
        shares = [share(host, name) for name in ("share", "other", "socket")]
        disks = [enter(disk(programs, folder, name))[0] for name in ("disk", "disk2")]
        first = enter(ExitStack())
        running = first.enter_context(proxy(host, "disk"))
        enter(proxy(host, "disk2"))
        enter(others(programs, host, folder / "socket"))
        xml = "".join(map(example, DEVICES))
        words = f"marker={MARKER}"
        guest = enter(Domain(host, xml, words))
        yield Scene(host, guest, shares, disks, first, running)


def test_devices_are_used(scene):
    for folder in scene.shares:
        folder.use(scene.guest)
    check_disk(scene.guest, "vda", scene.image("disk"))
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
    assert reading.result() == digest(scene.image("disk"))


def test_disk_comes_and_goes(scene):
    scene.host.vm.joinpath("disk.xml").write_text(example("A disk that comes later"))
    scene.host.run("virsh", "attach-device", "guest", "/run/vm/disk.xml")
    scene.guest.sh("until [ -e /dev/vdb ]; do sleep 0.1; done")
    check_disk(scene.guest, "vdb", scene.image("disk2"))
    scene.host.run("virsh", "detach-device", "guest", "/run/vm/disk.xml")
    scene.guest.sh("while [ -e /dev/vdb ]; do sleep 0.1; done")


@pytest.fixture(scope="module")
def with_open_files(scene: Scene) -> Scene:
    scene.guest.call(files.hold, "/mnt/share", False)
    return scene


def test_domain_is_saved_and_goes_on(with_open_files):
    """Once in a file of the user's and once in libvirt's own."""
    scene = with_open_files
    for script in (
        "virsh save guest saved; virsh restore saved",
        "virsh managedsave guest; virsh start guest",
    ):
        scene.guest.goes_on_after(script)
        scene.check()


@pytest.fixture
def there(programs, scene) -> Iterator[Host]:
    """Another host, which has the same folders and image."""
    with new_folder() as folder, ExitStack() as stack:
        enter = stack.enter_context
        host = enter(Host(need(keep=False), folder, of_the_tree(folder), "there"))
        host.run("sh", "-euc", example(DESCRIPTOR, "sh"))
        for each in scene.shares:
            mount(host, each.folder)
        scene.guest.can_boot_at(host)
        enter(disk(programs, folder, "disk", scene.image("disk")))
        enter(proxy(host, "disk"))
        enter(others(programs, host, scene.host.folder / "socket"))
        yield host


def test_domain_moves_to_another_host_and_back(with_open_files, there):
    """By the document's line, but libvirt is reached without a key."""
    scene, here = with_open_files, with_open_files.host
    here.connect(there)
    line = example("To another host", "sh").replace("+ssh:", "+tcp:")
    scene.guest.goes_on_after(line, there)
    scene.check()
    assert here.run("virsh", "domstate", "guest").strip() == "shut off"
    scene.guest.goes_on_after(line.replace("//there/", "//here/"), here)
    scene.check()


def test_domain_reboots(scene):
    """The test is the guest's part, which turns the power off when it is asked to."""
    scene.host.run("virsh", "reboot", "guest", "--mode=acpi")
    scene.guest.begin(sh, "poweroff -f")
    scene.guest.booted()
    test_devices_are_used(scene)


def test_domain_is_reset(scene):
    """In the midst of requests, of which the guest is told nothing."""
    scene.guest.begin(sh, f"while :; do {READ.format('vda')}; done > /dev/null")
    scene.host.run("virsh", "reset", "guest")
    scene.guest.booted()
    test_devices_are_used(scene)


def test_airlocks_of_libvirt_end_with_the_domain(scene):
    scene.host.run("virsh", "destroy", "guest")
    assert scene.host.find("virtiofsd") == []
    logs = scene.host.run("sh", "-c", "cat /var/log/libvirt/qemu/guest-*-virtiofsd.log")
    # Two folders, at the start, after each of two saves, and on the return.
    assert logs.count("Client connected") == 2 * 4
    assert "Traceback" not in logs


def test_apparmor_is_as_the_document_says(scene):
    """By libvirt's helper, which prints the rules for the domain."""
    xml = scene.host.vm.joinpath("guest.xml").read_text()
    emulator = example("Every device of a domain")
    xml = xml.replace("<devices>", f"<devices>{emulator}")
    scene.host.vm.joinpath("apparmor.xml").write_text(xml)
    helper = "/usr/lib/libvirt/virt-aa-helper --create --dryrun"
    domain = f"--uuid libvirt-{UUID} < /run/vm/apparmor.xml"
    rules = scene.host.run("sh", "-euc", f"{helper} {domain}")
    assert '"/run/vm/net.sock" rw' in rules
    assert '"/var/lib/libvirt/qemu/domain--1-guest/*" rw' in rules
    for missing in ("disk.sock", "fs.sock", "vhost-airlock"):
        assert missing not in rules


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
    assert "vhost-airlock" not in rules
