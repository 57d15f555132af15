# SPDX-License-Identifier: Apache-2.0
"""QEMU and virtiofsd of Debian 12 and 13, as the README's table of versions has them.

tests/real has all recipes with the programs of the next release.
"""

from contextlib import ExitStack

import pytest

from tests.guest import devices
from tests.guest.machine import Guest
from tests.real.airlock import airlock
from tests.real.programs import PROJECT, new_folder
from tests.real.storage import Disk, storage_daemon

pytestmark = pytest.mark.real

README = (PROJECT / "README.md").read_text()
RECONNECT = {"debian-12": "reconnect=1", "debian-13": "reconnect-ms=1000"}
VIRTIOFSD = {
    "debian-12": "/usr/lib/qemu/virtiofsd --fd={listen-fd} -o source=/srv/share",
    "debian-13": "/usr/libexec/virtiofsd --fd={listen-fd} --shared-dir=/srv/share",
}
WRITE = "echo {word} | dd of=/dev/vda bs=512 seek={sector} conv=sync oflag=direct"


def test_disk_and_folder_of_a_guest(release):
    """The disk survives a new airlock, by the option that this QEMU has for it."""
    name = release.root.name
    reconnect, command = RECONNECT[name], VIRTIOFSD[name]
    assert f"`{reconnect}`" in README
    assert command.split()[0] in README
    with ExitStack() as stack:
        folder = stack.enter_context(new_folder())
        share, image, front = folder / "share", folder / "image", folder / "front.sock"
        share.mkdir()
        (share / "host").write_text("from the host\n")
        image.write_bytes(bytes(1 << 20))
        argv = command.replace("/srv/share", str(share)).split()
        back = stack.enter_context(
            storage_daemon(release, Disk(image), folder / "back.sock")
        )[1]
        stack.enter_context(airlock(None, folder / "fs.sock", command=release(*argv)))
        with airlock(back, front):
            disk = devices.disk(front)
            chardev = [
                f"{word},{reconnect}" if word.startswith("socket,") else word
                for word in disk.arguments
            ]
            disk = devices.Device(tuple(chardev), disk.modules)
            shared = devices.file_system(folder / "fs.sock", "share")
            guest = stack.enter_context(Guest(release, folder, disk, shared))
            guest.sh("mount -t virtiofs share /mnt")
            assert guest.sh("cat /mnt/host") == "from the host\n"
            guest.sh("echo from the guest > /mnt/guest")
            assert (share / "guest").read_text() == "from the guest\n"
            guest.sh(WRITE.format(word="first", sector=1))
        with airlock(back, front):
            guest.sh(WRITE.format(word="second", sector=2))
            sectors = image.read_bytes()
            written = sectors[512:1536].replace(b"\0", b" ").split()
            assert written == [b"first", b"second"]
            guest.sh("umount /mnt")
            guest.power_off()
