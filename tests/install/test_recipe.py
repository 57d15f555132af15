# SPDX-License-Identifier: Apache-2.0
"""The README's way from the package to an isolated guest, on Debian 12 and 13.

The image that a user brings is made here: a boot loader, Debian's kernel, and an init
that writes a file to its disk. All of it is read through the airlock, first by QEMU's
firmware.
"""

import re
import subprocess
from pathlib import Path

import pytest

from tests.guest.initramfs import bootable_kernel, plain_initramfs
from tests.guest.machine import PATIENCE
from tests.install.releases import long_on
from tests.real.processes import Process
from tests.real.programs import PROJECT

pytestmark = pytest.mark.real

README = (PROJECT / "README.md").read_text()
RECIPE = re.search(r"```sh\n(apt install .*?)```", README, re.S)
MODULES = ["virtio_pci", "virtio_blk", "vfat"]
MODULES += ["nls_cp437", "nls_ascii", "nls_iso8859_1", "nls_utf8"]
INIT = b"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod "/modules/$module"; done
until mount -t vfat /dev/vda /mnt; do sleep 0.1; done
echo "the guest has its disk"
read answer
echo "$answer, says the guest" > /mnt/written
umount /mnt
poweroff -f
"""
LOADER = """DEFAULT guest
LABEL guest
KERNEL vmlinuz
INITRD initrd
APPEND console=ttyS0 quiet
"""
IMAGE = """
mkfs.vfat -C guest.img 65536 > image.log
mcopy -i guest.img {kernel} ::vmlinuz
mcopy -i guest.img initrd syslinux.cfg ::
syslinux --install guest.img
"""
AFTER = "mcopy -n -i /var/lib/guest.img ::written written"


@long_on("debian-12")
def test_recipe_ends_in_an_isolated_guest(package):
    assert RECIPE
    lines = RECIPE[1].rstrip().splitlines()
    assert len(lines) <= 10
    folder, release = package.folder, package.release
    (folder / "initrd").write_bytes(plain_initramfs(release, INIT, MODULES))
    (folder / "syslinux.cfg").write_text(LOADER)
    image = IMAGE.format(kernel=bootable_kernel(release))
    script = f"cd {folder}\n{image}\n{RECIPE[1]}\n{AFTER}\n"
    script = script.replace("apt install", "apt-get -qq install --yes")
    # A process namespace, so that the daemon ends too.
    argv = ["unshare", "--pid", "--fork", "--kill-child"]
    argv += release("sh", "-euc", "mount -t proc proc /proc\n" + script)
    with Process(argv, folder / "log", stdin=subprocess.PIPE) as recipe:
        recipe.wait_until(
            lambda: "the guest has its disk" in recipe.output(), timeout=PATIENCE
        )
        held = maps_of("qemu-storage-daemon", "path=/run/disk-backend/sock")
        assert "vhost-airlock-pool" in held
        assert "memory-backend-memfd" not in held
        assert recipe.popen.stdin
        recipe.popen.stdin.write(b"it works\n")
        recipe.popen.stdin.flush()
        assert recipe.wait(PATIENCE) == 0, recipe.describe()
    assert (folder / "written").read_text() == "it works, says the guest\n"


def maps_of(program: str, argument: str) -> str:
    """The memory maps of the process with this name and argument."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name, *words = (process / "cmdline").read_text().split("\0")
            if Path(name).name == program and any(argument in word for word in words):
                return (process / "maps").read_text()
        except OSError:
            continue
    raise AssertionError(f"no {program} runs")
