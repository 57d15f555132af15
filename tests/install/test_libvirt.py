# SPDX-License-Identifier: Apache-2.0
"""From the package to an isolated domain of libvirt, by the README's lines."""

import re
import secrets
import shutil
from contextlib import ExitStack

import pytest

from tests.guest.machine import Machine
from tests.install.releases import long_on
from tests.real.libvirt import Domain, Host, Share, check_disk, disk, example, share
from tests.real.programs import PROJECT
from vhost_airlock.peers.scan import search

pytestmark = pytest.mark.real

README = (PROJECT / "README.md").read_text()
DESCRIPTOR = "Every shared folder of a host"
YES = {"etc/apt/apt.conf.d/yes": 'APT::Get::Assume-Yes "true";\n'}
"""apt does not ask."""
MARKER = secrets.token_hex(16)


def lines(release: str) -> str:
    """The README's lines, without the package that Debian 12 does not have."""
    found = re.search(r"^### libvirt$.*?^```sh\n(.*?)^```", README, re.M | re.S)
    assert found
    assert found[1].count("\n") <= 10
    first, rest = found[1].split("\n", 1)
    if release == "debian-12":
        first = first.removesuffix(" virtiofsd")
    return f"{first}\n{rest}"


def use(host: Host, guest: Machine, folder: Share, *back_ends: int) -> None:
    """The folder is there, and no back-end has the guest's memory."""
    folder.use(guest)
    started = host.find("virtiofsd")
    assert len(started) == 2
    (qemu,) = host.find("qemu-system-x86")
    assert search(qemu, [MARKER.encode()]).found
    for back in [*started, *back_ends]:
        assert search(back, [MARKER.encode()]).found == ()


@long_on("debian-13")
def test_domain_is_isolated_by_ten_lines_and_by_one(package):
    """First its folder by the README's lines, then all its devices by an emulator."""
    words = f"marker={MARKER}"
    with ExitStack() as stack:
        enter = stack.enter_context
        host = enter(Host(package.release, package.folder, YES))
        shutil.copy(package.folder / package.name, host.vm)
        shared = share(host, "share")
        xml = example(DESCRIPTOR)
        script = lines(package.release.root.name)
        with Domain(host, xml, words, script) as guest:
            use(host, guest, shared)
            host.run("virsh", "destroy", "guest")

        host.run("rm", "/etc/qemu/vhost-user/10-vhost-airlock.json")
        daemon, back = enter(disk(package.release, package.folder, "disk"))
        back.chmod(0o666)
        host.vm.joinpath("disk.sock").symlink_to(back)
        xml += example("Every device of a domain") + example("A disk")
        with Domain(host, xml, words) as guest:
            check_disk(guest, "vda", package.folder / "disk.img")
            use(host, guest, shared, daemon.pid)
            host.run("virsh", "destroy", "guest")
