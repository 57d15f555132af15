# SPDX-License-Identifier: Apache-2.0
"""A virtual machine under QEMU's own emulation, with vhost-user devices."""

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar, TypeVarTuple

from tests.guest.devices import Device
from tests.guest.initramfs import initramfs, kernel
from tests.guest.inside.agent import sh
from tests.guest.lines import Lines
from tests.real.processes import Process
from tests.real.programs import Programs
from tests.real.qmp import Qmp

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

PATIENCE = 150.0
"""Seconds that an emulated machine has to answer: others may want the processors."""

SLOW = ("erms", "fsrm", "la57")
"""Features of a processor by which an emulated guest takes an eighth longer to boot.

They stand for strings of bytes, instead of words, and page tables of five levels.
"""
CPU = ",".join(["max", *(f"{name}=off" for name in SLOW)])
BOOT_WORDS = (
    "console=ttyS0 quiet panic=0 tsc=unstable"
    " initcall_blacklist=load_system_certificate_list cryptomgr.notests clearcpuid=395"
)
"""Without the kernel's tests of ciphers, a seventh of a boot, and without FSRS (395),
which not every QEMU knows by name: memset() by bytes is another tenth."""


def initramfs_for(programs: Programs, *devices: Device) -> bytes:
    """An initramfs with all that a guest with these devices needs."""
    modules = [name for device in devices for name in device.modules]
    tools = [name for device in devices for name in device.tools]
    return initramfs(programs, ["virtio_pci", *modules], tools)


class Call(Generic[T]):
    """A function that runs in the guest meanwhile."""

    def __init__(self, guest: "Machine", name: str) -> None:
        self.guest = guest
        self.name = name

    def result(self, timeout: float = PATIENCE) -> T:
        """Return a function's result, by way of JSON; its exception fails the test."""
        answer = self.guest.hear(timeout)
        if "error" in answer:
            raise AssertionError(f"in the guest, {self.name}: {answer['error']}")
        value: T = answer["result"]
        return value


class Machine(ABC):
    """Calls to the agent of a running machine."""

    agent: Lines

    @abstractmethod
    def describe(self) -> str:
        """All that helps when a call has failed."""

    def hear(self, timeout: float) -> Any:
        """The next answer of the agent."""
        try:
            return self.agent.receive(timeout)
        except (EOFError, TimeoutError) as error:
            raise AssertionError(f"guest: {error}\n{self.describe()}") from None

    def begin(self, function: Callable[[*Ts], T], *args: *Ts) -> Call[T]:
        """Call a function of a module in tests/guest/inside, in the guest."""
        name = function.__name__
        self.agent.send([function.__module__, name, args])
        return Call(self, name)

    def call(
        self, function: Callable[[*Ts], T], *args: *Ts, timeout: float = PATIENCE
    ) -> T:
        """The same, and wait for the result."""
        return self.begin(function, *args).result(timeout)

    def sh(self, command: str) -> str:
        """Run a shell command in the guest: its output."""
        return self.call(sh, command)


class Guest(Process, Machine):
    """A machine, running and ready for calls. Its console is the process's output.

    One that `waits` for a state, or has a `source` whose state is to come, does not run
    yet (tests/guest/booted.py, tests/guest/migration.py).
    """

    def __init__(
        self,
        programs: Programs,
        folder: Path,
        *devices: Device,
        cpus: int = 1,
        memory: str = "256M",
        boot_words: str = "",
        source: "Guest | None" = None,
        waits: bool = False,
    ) -> None:
        waits = waits or source is not None
        self.archive: Path = source.archive if source else folder / "initramfs"
        if source is None:
            self.archive.write_bytes(initramfs_for(programs, *devices))
        ours, agent = socket.socketpair()
        self.agent = Lines(ours)
        monitor, theirs = socket.socketpair()
        argv = programs(
            "qemu-system-x86_64",
            *("-M", "q35,accel=tcg,memory-backend=ram", "-cpu", CPU),
            *("-smp", str(cpus), "-m", memory),
            *("-object", f"memory-backend-memfd,id=ram,size={memory},share=on"),
            *("-nodefaults", "-display", "none", "-serial", "stdio"),
            *("-chardev", f"socket,id=agent,fd={agent.fileno()}"),
            *("-serial", "chardev:agent"),
            *Qmp.options(theirs.fileno()),
            *("-kernel", str(kernel(programs)), "-initrd", str(self.archive)),
            *("-append", f"{BOOT_WORDS} {boot_words}"),
            *(word for device in devices for word in device.arguments),
            *(("-S", "-incoming", "defer") if waits else ()),
        )
        fds = [agent.fileno(), theirs.fileno()]
        super().__init__(argv, folder / "guest.log", pass_fds=fds)
        agent.close()
        theirs.close()
        self._monitor = monitor
        try:
            self.qmp = Qmp(monitor)
            if not waits:
                Call[str](self, "boot").result()
        except OSError as error:
            self.kill()
            raise AssertionError(f"{error}\n{self.describe()}") from None
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        super().kill()
        self.agent.close()
        self._monitor.close()

    def begin_reboot(self) -> Call[str]:
        """Reset the machine; it is ready again when the result is there."""
        self.qmp("system_reset")
        return Call(self, "reboot")

    def reboot(self) -> None:
        self.begin_reboot().result()

    def power_off(self) -> None:
        self.begin(sh, "poweroff -f")
        assert self.wait(timeout=30) == 0, self.describe()
