# SPDX-License-Identifier: Apache-2.0
"""QEMU's own vhost-user tests, with the airlock in between, and what it must change.

Of its tests/qtest/vhost-user-test.c, these are read-guest-mem, and those that start
kinds of devices beside disk and net. The test is the guest; QEMU is real. The others
are in test_connections.py.
"""

import mmap
import secrets
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from tests.real.airlock import airlock
from tests.real.qtest import MEMFD, MIB, RAM, QtestMachine, VirtioDevice
from tests.real.storage import Disk, storage_daemon
from tests.support.backs import RecordedBack
from vhost_airlock.peers.disk import HEADER, BlkType
from vhost_airlock.peers.scan import search
from vhost_airlock.peers.server import DeviceServer
from vhost_airlock.vhost.channel import Channel

ANY = (1 << 64) - 1


@pytest.mark.parametrize("kind", ["memfd", "shm", "file"])
def test_guest_memory_is_read_directly_only(serve, programs, folder, via, kind):
    """The marker is everywhere in it but in the request, which holds another one."""
    image = folder / "disk.img"
    image.write_bytes(bytes(MIB))
    served = serve(Disk(image))
    marker, written = secrets.token_bytes(16), secrets.token_bytes(512)
    memory = {
        "memfd": MEMFD,
        "shm": f"memory-backend-shm,id=ram,size={RAM}",
        "file": f"memory-backend-file,id=ram,size={RAM},share=on"
        f",mem-path={folder / 'ram'}",
    }[kind]
    chardev = ("-chardev", f"socket,id=front,path={served.front}")
    device = "vhost-user-blk-pci-non-transitional,chardev=front"
    log = folder / "qemu.log"
    with QtestMachine(programs, log, [device], chardev, memory=memory) as machine:
        places = [*range(0x1000, 640 << 10, 0x10000), *range(MIB + 64000, RAM, MIB)]
        for place in places:
            machine.write(place, marker)
        assert machine.ram.find(marker) == places[0]

        disk = VirtioDevice(machine)
        disk.negotiate(ANY)
        disk.add_queue(0)
        disk.start()
        request = HEADER.pack(BlkType.OUT, 0, 1) + written
        assert disk.request(0, request, writable=1) == b"\0"
        request = HEADER.pack(BlkType.IN, 0, 1)
        assert disk.request(0, request, writable=513) == written + b"\0"
        assert image.read_bytes()[512:1024] == written

        found = search(served.backend.pid, [marker, written]).found
        assert written in {one.marker for one in found}
        markers = [one for one in found if one.marker == marker]
        assert len(markers) == (len(places) if via == "direct" else 0)
        disk.reset()


@pytest.mark.parametrize("kind", ["memfd", "ram"])
def test_guest_memory_that_is_not_shared_is_told(programs, folder, kind):
    """The user has forgotten share=on."""
    image = folder / "disk.img"
    image.write_bytes(bytes(MIB))
    back, front = folder / "back.sock", folder / "front.sock"
    memory = f"memory-backend-{kind},id=ram,size={RAM},share=off"
    chardev = ("-chardev", f"socket,id=front,path={front}")
    device = "vhost-user-blk-pci-non-transitional,chardev=front"
    log = folder / "qemu.log"
    with (
        storage_daemon(programs, Disk(image), back),
        airlock(back, front) as proxy,
        QtestMachine(programs, log, [device], chardev, memory=memory) as machine,
        mmap.mmap(-1, RAM) as nobodys,
    ):
        machine.use_ram(nobodys)
        disk = VirtioDevice(machine)
        disk.negotiate(ANY)
        disk.add_queue(0)
        disk.start()
        proxy.wait_until(lambda: "is share=on missing?" in proxy.output())
        disk.reset()


# Other kinds of devices.


@dataclass
class Kind:
    """A device of QEMU's, and what a back-end of it does with a request."""

    name: str
    answer: Callable[[bytes], bytes]
    requests: list[tuple[int, bytes]]
    """Each with its queue."""
    features: int = 0
    num_queues: int = 1
    space: bytes = b""
    """The configuration space."""
    got: list[bytes] = field(default_factory=list)

    def config(self) -> bytes:
        return self.space

    def serve(
        self, readable: Sequence[memoryview], writable: Sequence[memoryview]
    ) -> int:
        self.got.append(b"".join(readable))
        answer = self.answer(self.got[-1])
        writable[0][: len(answer)] = answer
        return len(answer)


class KindBack(RecordedBack):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind

    def serve(self, channel: Channel) -> None:
        DeviceServer(channel, self.kind).run()


def backwards(request: bytes) -> bytes:
    return request[::-1]


KINDS = [
    # Entropy.
    Kind("vhost-user-rng-pci", lambda _: bytes(range(32)), [(0, b"")] * 3),
    # A write of two bytes to address 0x50, and a read: the status is the last byte.
    Kind(
        "vhost-user-i2c-pci",
        lambda request: b"\0" if len(request) > 8 else b"read\0",
        [
            (0, struct.pack("<HHI", 0x50 << 1, 0, 0) + b"ab"),
            (0, struct.pack("<HHI", 0x50 << 1, 0, 2)),
        ],
        features=1,  # zero-length requests
    ),
    # Set a line, and get it.
    Kind(
        "vhost-user-gpio-pci",
        lambda request: bytes([0, request[2]]),
        [(0, struct.pack("<HHI", 5, 3, 1)), (0, struct.pack("<HHI", 4, 3, 0))],
        features=1,  # interrupts
        num_queues=2,
        space=struct.pack("<HxxI", 8, 0),
    ),
    # A type that nobody knows.
    Kind(
        "vhost-user-test-device-pci,virtio-id=40,num_vqs=5,config_size=48",
        backwards,
        [(queue, secrets.token_bytes(100 + queue)) for queue in range(5)] * 2,
        features=1 << 5 | 1 << 55,
        num_queues=5,
        space=secrets.token_bytes(48),
    ),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.split(",")[0])
def test_other_kinds_of_devices(programs, folder, connect, kind):
    kind.got.clear()
    front = connect(KindBack(kind), "--workers=2")
    name, *properties = kind.name.split(",")
    device = ",".join([name, "chardev=front", *properties])
    chardev = ("-chardev", f"socket,id=front,path={front}")
    with QtestMachine(programs, folder / "qemu.log", [device], chardev) as machine:
        driver = VirtioDevice(machine)
        assert driver.negotiate(ANY) & kind.features == kind.features
        assert driver.config(len(kind.space)) == kind.space
        for index in range(kind.num_queues):
            driver.add_queue(index)
        driver.start()
        for queue, request in kind.requests:
            answer = driver.request(queue, request, writable=512)
            assert answer == kind.answer(request)
        assert kind.got == [request for _, request in kind.requests]
        driver.reset()
