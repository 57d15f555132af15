# SPDX-License-Identifier: Apache-2.0
"""QEMU without a guest: the test itself drives the virtual machine's devices.

This is QEMU's own way to test devices. No processor runs; instead, a socket takes
commands such as "write this word at that address". On top of it is the driver's side
of virtio over PCI (virtio 1.3, section 4.1), on top of that the package's rings.
"""

import mmap
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.real.processes import Process
from tests.real.programs import Programs
from tests.real.qmp import Qmp
from vhost_airlock.peers.driver import DriverRing
from vhost_airlock.peers.ring import Buffer, SplitLayout, SplitRing
from vhost_airlock.peers.scan import mappings
from vhost_airlock.vhost.wire import Feature

MIB = 1 << 20
RAM = 64 * MIB
MEMFD = f"memory-backend-memfd,id=ram,size={RAM},share=on"

CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
WINDOW = 0xE000_0000
"""Where we put the devices' registers."""

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8
COMMON, NOTIFY, ISR, DEVICE = 1, 2, 3, 4
"""The kinds of registers."""


class QtestMachine(Process):
    """QEMU with the given devices, which are on the bus from slot 4 on.

    They must be "modern": where QEMU has two of a kind, "non-transitional".
    """

    def __init__(
        self,
        programs: Programs,
        log: Path,
        devices: Sequence[str],
        options: Sequence[str] = (),
        *,
        memory: str = MEMFD,
        by: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> None:
        ours, theirs = socket.socketpair()
        monitor, monitor_theirs = socket.socketpair()
        self._sock = ours.makefile("rwb")
        with theirs, monitor_theirs, ours:
            fds = [theirs.fileno(), monitor_theirs.fileno()]
            argv = programs(
                "qemu-system-x86_64",
                *("-machine", "q35,memory-backend=ram", "-m", f"{RAM // MIB}M"),
                *("-object", memory),
                *("-accel", "qtest", "-nodefaults", "-display", "none"),
                *("-chardev", f"socket,id=qtest,fd={fds[0]}"),
                *("-qtest", "chardev:qtest", "-qtest-log", "none"),
                *Qmp.options(fds[1]),
                *options,
            )
            for slot, device in enumerate(devices, 4):
                argv += ["-device", f"{device},addr={slot}"]
            super().__init__([*by, *argv], log, pass_fds=[*fds, *pass_fds])
        self._monitor = monitor
        self._qmp: Qmp | None = None
        self._ram: mmap.mmap | None = None

    @property
    def qmp(self) -> Qmp:
        """It answers as soon as all devices are there."""
        if self._qmp is None:
            self._qmp = Qmp(self._monitor)
        return self._qmp

    def command(self, *words: object) -> str:
        """Let the machine do something: what it answers."""
        try:
            self._sock.write(" ".join(map(str, words)).encode() + b"\n")
            self._sock.flush()
            status, *answer = self._sock.readline().decode().split()
            assert status == "OK", f"{words}: {status} {answer}"
        except (OSError, ValueError) as error:
            raise AssertionError(f"{words}: {error}\n{self.describe()}") from None
        return answer[0] if answer else ""

    def read(self, addr: int, size: int) -> bytes:
        """Guest memory, through QEMU."""
        return bytes.fromhex(self.command("read", hex(addr), size)[2:])

    def write(self, addr: int, data: bytes) -> None:
        self.command("write", hex(addr), len(data), f"0x{data.hex()}")

    @property
    def ram(self) -> mmap.mmap:
        """Guest memory itself, in which rings need atomic access."""
        if self._ram is None:
            place = next(
                mapping.place
                for mapping in mappings(self.pid)
                if mapping.shared and mapping.size == RAM
            )
            start, end = (int(side, 16) for side in place.split("-"))
            fd = os.open(f"/proc/{self.pid}/map_files/{start:x}-{end:x}", os.O_RDWR)
            self._ram = mmap.mmap(fd, RAM)
            os.close(fd)
        return self._ram

    def use_ram(self, ram: mmap.mmap) -> None:
        """Put rings there, as the machine's own memory is not shared."""
        self._ram = ram

    def kill(self) -> None:
        super().kill()
        self._sock.close()
        self._monitor.close()


@dataclass
class Queue:
    """A ring that the device was told, and its registers."""

    index: int
    driver: DriverRing
    doorbell: int
    free: int
    """Where the next buffer goes."""
    armed: bool = True
    """Will there be an interrupt?"""

    def alloc(self, size: int) -> int:
        addr, self.free = self.free, (self.free + size + 63) & ~63
        return addr


class VirtioDevice:
    """The driver of one device. Its queues have 1 MiB each, from 8 MiB on."""

    def __init__(self, machine: QtestMachine, slot: int = 4, size: int = 64) -> None:
        self.machine = machine
        self.slot = slot
        self.size = size
        self.features = 0
        self.queues: dict[int, Queue] = {}
        self._registers: dict[int, int] = {}
        self._multiplier = 0
        self._find_registers()

    def negotiate(self, wanted: int) -> int:
        """Begin anew, and accept what is wanted of what is offered: what was."""
        self.reset()
        self._status(ACKNOWLEDGE)
        self._status(ACKNOWLEDGE | DRIVER)
        self.features = self.offered() & (wanted | Feature.VERSION_1)
        for half in (0, 1):
            self._common(8, half, "l")
            self._common(12, self.features >> (32 * half) & 0xFFFF_FFFF, "l")
        self._status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        assert self.get(COMMON, 20, "b") & FEATURES_OK
        return self.features

    def offered(self) -> int:
        features = 0
        for half in (0, 1):
            self._common(0, half, "l")
            features |= self.get(COMMON, 4, "l") << (32 * half)
        return features

    def add_queue(self, index: int) -> Queue:
        """Set a queue up; the device starts it with start()."""
        self._common(22, index, "w")
        size = min(self.size, self.get(COMMON, 24, "w"))
        self._common(24, size, "w")
        start = (8 + index + 16 * (self.slot - 4)) * MIB
        layout = SplitLayout(size, start)
        ram = self.machine.ram
        ram[start : layout.end] = bytes(layout.end - start)
        ring = SplitRing.at(memoryview(ram), layout)
        for offset, part in ((32, layout.desc), (40, layout.avail), (48, layout.used)):
            self._common(offset, part, "q")
        doorbell = self.get(COMMON, 30, "w") * self._multiplier
        self._common(28, 1, "w")
        driver = DriverRing(ring, event_idx=bool(self.features & Feature.EVENT_IDX))
        queue = Queue(index, driver, self._registers[NOTIFY] + doorbell, layout.end)
        self.queues[index] = queue
        return queue

    def start(self) -> None:
        self._status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    def reset(self) -> None:
        self._status(0)
        for queue in self.queues.values():
            queue.driver.ring.release()
        self.queues.clear()

    def send(self, index: int, readable: bytes = b"", writable: int = 0) -> int:
        """Offer a request: where its writable part is."""
        queue = self.queues[index]
        buffers = []
        if readable:
            addr = queue.alloc(len(readable))
            self.machine.write(addr, readable)
            buffers.append(Buffer(addr, len(readable)))
        answer = queue.alloc(writable)
        if writable:
            buffers.append(Buffer(answer, writable, writable=True))
        queue.driver.offer(buffers)
        queue.driver.publish()
        if queue.driver.kick_needed():
            self.kick(index)
        return answer

    def kick(self, index: int) -> None:
        self.machine.command("writew", hex(self.queues[index].doorbell), index)

    def finish(self, index: int) -> int:
        """Wait for one request, and for the interrupt: how much was written."""
        queue = self.queues[index]
        driver = queue.driver
        self.machine.wait_until(lambda: driver.ring.used_idx != driver.next_used)
        if queue.armed:
            self.machine.wait_until(lambda: bool(self.get(ISR, 0, "b") & 1))
        written = next(driver.used())[1]
        queue.armed = not driver.arm()
        return written

    def request(self, index: int, readable: bytes = b"", writable: int = 0) -> bytes:
        """Do one request: what was written."""
        answer = self.send(index, readable, writable)
        written = self.finish(index)
        return self.machine.read(answer, written) if written else b""

    def config(self, size: int) -> bytes:
        """The start of the configuration space."""
        return bytes(self.get(DEVICE, at, "b") for at in range(size))

    def get(self, kind: int, offset: int, width: str) -> int:
        """Read a register."""
        addr = self._registers[kind] + offset
        return int(self.machine.command(f"read{width}", hex(addr)), 16)

    def _common(self, offset: int, value: int, width: str) -> None:
        addr = self._registers[COMMON] + offset
        self.machine.command(f"write{width}", hex(addr), hex(value))

    def _status(self, value: int) -> None:
        self._common(20, value, "b")
        if not value:
            self.machine.wait_until(lambda: self.get(COMMON, 20, "b") == 0)

    # The PCI configuration space.

    def _find_registers(self) -> None:
        """Map the device's memory, and find the registers in it (section 4.1.4)."""
        window = WINDOW + self.slot * MIB
        at = self._read_pci(0x34) & 0xFF
        while at:
            head = struct.pack("<III", *(self._read_pci(at + i) for i in (0, 4, 8)))
            kind, following, _, kind_of_register, bar = struct.unpack("<5B7x", head)
            if kind == 9 and kind_of_register in (COMMON, NOTIFY, ISR, DEVICE):
                self._registers[kind_of_register] = window + self._read_pci(at + 8)
                if kind_of_register == NOTIFY:
                    self._multiplier = self._read_pci(at + 16)
                self._write_pci(0x10 + 4 * bar, window)
            at = following
        self._write_pci(4, 6)  # memory, and bus master

    def _read_pci(self, offset: int) -> int:
        self._select(offset)
        return int(self.machine.command("inl", hex(CONFIG_DATA)), 16)

    def _write_pci(self, offset: int, value: int) -> None:
        self._select(offset)
        self.machine.command("outl", hex(CONFIG_DATA), hex(value))

    def _select(self, offset: int) -> None:
        address = 1 << 31 | self.slot << 11 | offset
        self.machine.command("outl", hex(CONFIG_ADDRESS), hex(address))
