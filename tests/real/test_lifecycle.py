# SPDX-License-Identifier: Apache-2.0
"""Deeds of guest, VMM and host to a disk in use, and its content after that."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.guest.booted import booted
from tests.guest.devices import FIO, Device
from tests.guest.inside import load
from tests.guest.inside.agent import sh
from tests.guest.machine import Guest
from tests.real.airlock import airlock
from tests.real.storage import Disk, storage_daemon
from tests.support.profiles import STRESS

CPUS = 2
"""And so many queues."""
REPLACED = 100 if STRESS else 3
"""How often the airlock is replaced; the first time it ends as told."""
KILLS = 1000
"""How often the airlock is killed in a row, only in `make stress`."""


def on_the_bus(chardev: str, properties: str = "") -> Device:
    return Device(
        (
            *("-chardev", f"socket,id=front,{chardev}"),
            *("-device", f"vhost-user-blk-pci,chardev=front{properties}"),
        ),
        ("virtio_blk",),
    )


def hotplugged(chardev: str) -> Device:
    """A disk that can be unplugged."""
    disk = on_the_bus(chardev, ",id=disk,bus=place")
    port = ("-device", "pcie-root-port,id=place,chassis=1")
    return Device((*port, *disk.arguments), disk.modules)


@pytest.fixture
def disk(folder: Path) -> Disk:
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    return Disk(image, queues=4)


@pytest.fixture
def go_on(programs, folder):
    """go_on(chardev): a guest that has booted, with a disk there."""

    def go_on_with(chardev: str) -> Guest:
        return booted(programs, folder, on_the_bus(chardev), cpus=CPUS, fio=True)

    return go_on_with


def test_whole_life_of_a_disk(programs, folder, serve, go_on, disk):
    """Requests are in flight whenever something happens, but nothing kept is lost."""
    front = serve(disk, "--workers=2").front
    device = hotplugged(f"path={front}")
    with Guest(programs, folder, device, FIO, cpus=CPUS, memory="384M") as guest:
        use(guest, 1)
        guest.reboot()
        assert_kept(guest, 1)

        use(guest, 2)
        name = guest.call(load.unbind)
        guest.call(load.lose)
        guest.call(load.bind, name)
        assert_kept(guest, 2)

        use(guest, 3)
        unplug(guest)
        guest.call(load.lose)
        plug(guest, front)
        assert_kept(guest, 3)

        use(guest, 4)
        guest.begin(sh, "reboot -f").result(timeout=90)
        assert_kept(guest, 4)

        use(guest, 5)
        guest.kill()
    with go_on(f"path={front}") as guest:
        assert_kept(guest, 5)
        guest.call(load.start, CPUS)
        assert guest.call(load.stop) >= 1
        guest.power_off()


def use(guest: Guest, seed: int) -> None:
    """Begin to use the disk in earnest, having written what must last."""
    guest.call(load.keep, seed)
    guest.call(load.start, CPUS)
    guest.call(load.busy)


def assert_kept(guest: Guest, seed: int) -> None:
    guest.call(load.wait_for_disk)
    guest.call(load.check_kept, seed)


def unplug(guest: Guest) -> None:
    guest.qmp("device_del", id="disk")
    guest.qmp.wait_for("DEVICE_DELETED", device="disk", timeout=60)
    guest.qmp("chardev-remove", id="front")


def plug(guest: Guest, front: Path) -> None:
    address = {"type": "unix", "data": {"path": str(front)}}
    socket = {"type": "socket", "data": {"addr": address, "server": False}}
    guest.qmp("chardev-add", id="front", backend=socket)
    device = {"driver": "vhost-user-blk-pci", "chardev": "front", "bus": "place"}
    guest.qmp("device_add", id="disk", **device)


@pytest.mark.parametrize("qemu", ["connects", "listens"])
def test_airlock_is_replaced_under_load(programs, folder, go_on, disk, qemu):
    """It ends as told, and is killed. The guest notices only the time that it takes.

    qemu-storage-daemon has requests in flight then, and ends them in any order.
    """
    listens, front = qemu == "listens", folder / "front.sock"
    chardev = f"path={front}," + ("server=on" if listens else "reconnect-ms=50")
    with ExitStack() as stack:
        daemon = storage_daemon(programs, disk, folder / "back.sock")
        _, back = stack.enter_context(daemon)
        proxies = stack.enter_context(ExitStack())
        proxy = proxies.enter_context(airlock(back, front, dials=listens))
        guest = stack.enter_context(go_on(chardev))
        guest.call(load.start, CPUS)
        for number in range(REPLACED):
            guest.call(load.busy)
            if number:
                proxy.kill()
            proxies.close()
            proxy = proxies.enter_context(airlock(back, front, dials=listens))
            guest.call(load.go_on)
        assert guest.call(load.stop) >= 4
        guest.power_off()


if STRESS:  # minutes

    def test_airlock_is_killed_again_and_again_under_load(
        programs, folder, go_on, disk, capsys
    ):
        """Each time with requests in flight, and as soon as some more are done. The
        guest finds no wrong byte and no error.
        """
        front = folder / "front.sock"
        with ExitStack() as stack:
            daemon = storage_daemon(programs, disk, folder / "back.sock")
            _, back = stack.enter_context(daemon)
            proxies = stack.enter_context(ExitStack())
            proxy = proxies.enter_context(airlock(back, front))
            guest = stack.enter_context(go_on(f"path={front},reconnect-ms=50"))
            guest.call(load.start, CPUS)
            for _ in range(KILLS):
                guest.call(load.busy)
                proxy.kill()
                proxies.close()
                proxy = proxies.enter_context(airlock(back, front))
                guest.call(load.progress)
            rounds = guest.call(load.stop)
            guest.power_off()
        assert rounds > 0
        with capsys.disabled():
            print(f"\n{KILLS} kills, {rounds} rounds of verified load")
