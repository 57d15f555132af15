# SPDX-License-Identifier: Apache-2.0
"""`vhost-airlock qemu` with the real QEMU: its devices, its ends, its ways to start."""

import mmap
import os
import secrets
import select
import signal
import socket
import sys
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import pytest

from tests.real.backends import passt, virtiofsd
from tests.real.network import Network
from tests.real.processes import Process
from tests.real.qmp import Qmp
from tests.real.qtest import MEMFD, MIB, QtestMachine, VirtioDevice
from tests.real.serving import hang_up, serving
from tests.real.storage import Disk, storage_daemon
from tests.support.airlocks import Airlocks
from tests.support.backs import ScriptedBack, wait_until
from tests.support.fuse import INIT, REPLY, REQUEST, Op
from vhost_airlock.peers.disk import HEADER, SECTOR, BlkType
from vhost_airlock.peers.scan import search

PATIENCE = 20.0
BLK = "vhost-user-blk-pci-non-transitional,chardev=disk"


def by(airlocks: Airlocks) -> list[str]:
    """The command that starts QEMU."""
    command = [sys.executable, "-m", "vhost_airlock", "qemu", "--timeout=60", "--"]
    return ["env", airlocks.environment, *command]


@pytest.fixture
def airlocks(folder: Path) -> Airlocks:
    return Airlocks(folder)


MARKER = secrets.token_bytes(16)
MRG_RXBUF = 1 << 15
ROUTER = bytes([169, 254, 2, 2])


def test_devices_of_a_guest(programs, folder, airlocks):
    """All kinds of back-end on one command line; one folder goes without an airlock.

    Its back-end has the guest's memory, so that the search is known to work.
    """
    image, share = folder / "disk.img", folder / "share"
    image.write_bytes(MARKER[::-1] * 4096)
    share.mkdir()
    on = "memory-isolation=on"
    plan = {
        "disk": f"vhost-user-blk-pci-non-transitional,chardev=disk,{on}",
        "fs": f"vhost-user-fs-pci,tag=fs,chardev=fs,{on}",
        "open": "vhost-user-fs-pci,tag=open,chardev=open",
        "net": f"virtio-net-pci-non-transitional,netdev=n,{on}",
    }
    paths = {name: folder / f"{name}.sock" for name in plan}
    options = ["-netdev", "vhost-user,id=n,chardev=net"]
    for name, path in paths.items():
        options += ["-chardev", f"socket,id={name},path={path}"]
    with ExitStack() as stack:
        enter = stack.enter_context
        network = enter(closing(Network(programs, folder)))
        backs = {
            "disk": enter(storage_daemon(programs, Disk(image), paths["disk"]))[0],
            "fs": enter(virtiofsd(programs, share, paths["fs"])),
            "open": enter(virtiofsd(programs, share, paths["open"])),
            "net": enter(passt(programs, network, paths["net"])),
        }
        machine = enter(
            QtestMachine(
                programs,
                folder / "qemu.log",
                [*plan.values()],
                options,
                by=by(airlocks),
            )
        )
        assert machine.qmp("query-name") == {}
        assert Path(f"/proc/{machine.pid}/comm").read_text() == "qemu-system-x86\n"
        pids = airlocks.pids()
        assert pids.keys() == {"disk", "fs", "net"}
        (private,) = airlocks.private()
        assert private.stat().st_mode & 0o777 == 0o700
        assert {path.stem for path in private.iterdir()} == pids.keys()

        for page in range(0, 4 * MIB, mmap.PAGESIZE):
            machine.ram[page : page + len(MARKER)] = MARKER
        slots = {name: slot for slot, name in enumerate(plan, 4)}
        disk = start(machine, slots["disk"], 1)
        read = disk.request(0, HEADER.pack(BlkType.IN, 0, 0), SECTOR + 1)
        assert read == MARKER[::-1] * (SECTOR // len(MARKER)) + b"\0"
        for name in ("fs", "open"):
            assert mount(start(machine, slots[name], 2)) == 7
        assert router_of(start(machine, slots["net"], 2)) == ROUTER

        found = {name: search(back.pid, [MARKER]).found for name, back in backs.items()}
        assert [name for name in found if found[name]] == ["open"]
        assert all(search(pid, [MARKER]).found for pid in pids.values())
        keeper = airlocks.keeper()
        machine.qmp("quit")
        assert machine.wait(PATIENCE) == 0
        airlocks.assert_end(keeper)


def start(machine: QtestMachine, slot: int, queues: int) -> VirtioDevice:
    driver = VirtioDevice(machine, slot)
    driver.negotiate(MRG_RXBUF)
    for index in range(queues):
        driver.add_queue(index)
    driver.start()
    return driver


def mount(driver: VirtioDevice) -> int:
    """The version of the protocol that a shared folder speaks."""
    init = INIT.pack(7, 38, 1 << 17, 0, 0)
    size = REQUEST.size + len(init)
    reply = driver.request(
        1, REQUEST.pack(size, Op.INIT, 2, 0, 0, 0, 1, 0, 0) + init, 256
    )
    return int.from_bytes(reply[REPLY.size :][:4], "little")


def router_of(driver: VirtioDevice) -> bytes:
    """The address of the router, by its own answer."""
    ours = bytes.fromhex("5254 0000 0001")
    ask = b"\xff" * 6 + ours + bytes.fromhex("0806 0001 0800 0604 0001")
    ask += ours + bytes([169, 254, 2, 1]) + bytes(6) + ROUTER
    rooms = [driver.send(0, writable=2048) for _ in range(8)]
    driver.request(1, bytes(12) + ask)
    while True:
        driver.queues[0].armed = False  # its interrupt may have come with the sender's
        driver.finish(0)
        reply = driver.machine.read(rooms.pop(0) + 12, 42)
        if reply[12:14] == b"\x08\x06":
            return reply[28:32]


class Blk:
    """A disk of which the test is the back-end and, by qtest, the guest."""

    def __init__(self, machine: QtestMachine, back: ScriptedBack) -> None:
        self.driver = VirtioDevice(machine)
        self.back = back
        self.driver.negotiate(0)
        self.driver.add_queue(0)
        self.driver.start()

    def request(self) -> None:
        self.driver.send(0, HEADER.pack(BlkType.IN, 0, 7), writable=SECTOR + 1)
        chain = self.back.take()
        assert HEADER.unpack(self.back.read(chain))[2] == 7
        self.back.complete(chain, bytes(SECTOR))
        assert self.driver.finish(0) == SECTOR + 1

    def running(self) -> bool:
        return self.back.vrings[0].ring is not None


def qtest(programs, airlocks: Airlocks, chardev: str) -> QtestMachine:
    return QtestMachine(
        programs,
        airlocks.folder / "qemu.log",
        [BLK],
        ("-chardev", f"socket,id=disk,{chardev}"),
        by=by(airlocks),
    )


@pytest.mark.parametrize("end", ["quit", "SIGTERM", "SIGKILL", "SIGTERM to all"])
def test_airlocks_end_with_qemu(programs, folder, airlocks, end):
    """The last is how a service manager stops a unit."""
    back, path = ScriptedBack(), folder / "back.sock"
    with serving(back, path), qtest(programs, airlocks, f"path={path}") as machine:
        Blk(machine, back).request()
        keeper = airlocks.keeper()
        if end == "quit":
            machine.qmp("quit")
        elif end == "SIGTERM to all":
            for pid in machine.pid, *airlocks.pids().values():
                os.kill(pid, signal.SIGTERM)
            signal.pidfd_send_signal(keeper, signal.SIGTERM)
        else:
            machine.popen.send_signal(getattr(signal, end))
        assert machine.wait(PATIENCE) == (-signal.SIGKILL if end == "SIGKILL" else 0)
        airlocks.assert_end(keeper)
    assert "Traceback" not in machine.output()


def test_qemu_connects_again(programs, folder, airlocks):
    """The same airlock serves all its connections."""
    back, path = ScriptedBack(), folder / "back.sock"
    chardev = f"path={path},reconnect-ms=50"
    with serving(back, path), qtest(programs, airlocks, chardev) as machine:
        disk, pids = Blk(machine, back), airlocks.pids()
        for connections in range(1, 4):
            wait_until(partial(came, back, connections), "QEMU connects")
            wait_until(disk.running, "the ring runs")
            disk.request()
            hang_up(back)
        assert airlocks.pids() == pids
        keeper = airlocks.keeper()
        machine.qmp("quit")
        machine.wait(PATIENCE)
        airlocks.assert_end(keeper)


def came(back: ScriptedBack, connections: int) -> bool:
    return back.connections >= connections


def test_qemu_listens(programs, folder, airlocks):
    """The back-end connects where QEMU would listen."""
    back, path = ScriptedBack(), folder / "back.sock"
    with closing(back), qtest(programs, airlocks, f"path={path},server=on") as machine:
        machine.wait_until(path.exists)
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        back.start(sock)
        Blk(machine, back).request()
        keeper = airlocks.keeper()
        machine.qmp("quit")
        machine.wait(PATIENCE)
        airlocks.assert_end(keeper)
    assert not path.exists()


def two_ends(server: str, path: Path) -> tuple[socket.socket, socket.socket]:
    """(the back-end's connection, QEMU's end of it or the socket that it listens at)"""
    if server == "off":
        return socket.socketpair()
    ours, theirs = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    theirs.bind(str(path))
    theirs.listen()
    ours.connect(str(path))
    return ours, theirs


@pytest.mark.parametrize("server", ["off", "on"])
def test_qemu_inherits_the_socket_of_a_back_end(programs, folder, airlocks, server):
    """Which is connected, or listens."""
    back = ScriptedBack()
    ours, theirs = two_ends(server, folder / "back.sock")
    back.start(ours)
    fd = theirs.fileno()
    command = [*by(airlocks)[:-1], f"--stats-dir={folder}", "--"]
    with theirs:
        machine = QtestMachine(
            programs,
            folder / "qemu.log",
            [BLK],
            ("-chardev", f"socket,id=disk,fd={fd},server={server}"),
            by=command,
            pass_fds=[fd],
        )
    with closing(back), machine:
        Blk(machine, back).request()
        keeper = airlocks.keeper()
        machine.qmp("quit")
        machine.wait(PATIENCE)
        airlocks.assert_end(keeper)


@pytest.fixture
def emulator(programs, folder, airlocks) -> list[str]:
    """QEMU with isolation under its name for libvirt, and QEMU itself on the PATH."""
    name = "qemu-system-x86_64"
    for file, content in (
        (name, f'#!/bin/sh\nexec {" ".join(programs(f"/usr/bin/{name}"))} "$@"\n'),
        (
            f"vhost-airlock-{name}",
            f"#!{sys.executable}\nimport sys\n"
            "from vhost_airlock.cli.emulator import emulator\nsys.exit(emulator())\n",
        ),
    ):
        folder.joinpath(file).write_text(content)
        folder.joinpath(file).chmod(0o755)
    path = f"PATH={folder}:{os.environ['PATH']}"
    return ["env", path, airlocks.environment, f"{folder}/vhost-airlock-{name}"]


def daemonized(folder: Path) -> tuple[str, ...]:
    """As libvirt starts QEMU to ask it for its abilities."""
    return (
        *("-S", "-no-user-config", "-nodefaults", "-nographic", "-daemonize"),
        *("-qmp", f"unix:{folder}/qmp.sock,server=on,wait=off"),
        *("-pidfile", f"{folder}/qemu.pid"),
    )


def quit_daemon(folder: Path) -> None:
    """Tell a QEMU that has left its parent to end, and wait for it."""
    pidfd = os.pidfd_open(int(folder.joinpath("qemu.pid").read_text()))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(folder / "qmp.sock"))
        qmp = Qmp(sock)
        assert qmp("query-target")["arch"] == "x86_64"
        qmp("quit")
        with os.fdopen(pidfd) as end:
            assert select.select([end], [], [], PATIENCE)[0]


def test_emulator_is_asked_for_its_abilities(folder, emulator, airlocks):
    with Process([*emulator, "--version"], folder / "log") as process:
        assert process.wait(PATIENCE) == 0
        assert process.output().startswith("QEMU emulator version")
    words = [*emulator, *daemonized(folder), "-machine", "none,accel=tcg"]
    with Process(words, folder / "log") as process:
        assert process.wait(PATIENCE) == 0, process.describe()
        assert process.output() == ""
    assert airlocks.private() == []
    quit_daemon(folder)


def test_daemon_keeps_its_airlocks(folder, emulator, airlocks):
    """QEMU's first process has ended, and nobody who waits for it is kept waiting."""
    back, path = ScriptedBack(), folder / "back.sock"
    words = [*emulator, *daemonized(folder), "-M", "q35,accel=tcg,memory-backend=ram"]
    words += ["-m", "64M", "-object", MEMFD, "-device", BLK]
    words += ["-chardev", f"socket,id=disk,path={path}"]
    with serving(back, path):
        with Process(words, folder / "log") as process:
            assert process.wait(PATIENCE) == 0, process.describe()
        (pid,) = airlocks.pids().values()
        assert os.readlink(f"/proc/{pid}/fd/2") == "/dev/null"
        keeper = airlocks.keeper()
        assert back.connections == 1
        quit_daemon(folder)
        airlocks.assert_end(keeper)
