# SPDX-License-Identifier: Apache-2.0
"""Real back-ends are killed at any moment, and started again. Their front-ends, which
know nothing of it, only wait.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.guest import devices
from tests.guest.booted import booted
from tests.guest.inside import blocks, streams
from tests.guest.inside import load as fio
from tests.guest.inside.frames import frames
from tests.guest.machine import Guest
from tests.real.airlock import airlock
from tests.real.processes import Process, listening
from tests.real.programs import Programs
from tests.real.stalling_nbd import NbdDisk, stalling_nbd
from tests.real.storage import Disk, StorageDaemon, start_daemon
from tests.real.testpmd import PacketFiles, Testpmd, vhost
from tests.support.backs import wait_until
from tests.support.profiles import STRESS
from vhost_airlock.cli.stats_document import ask, parse

MIB = 1 << 20
COUNT = 80
"""Requests in flight at a disk that stalls."""
AT_ONCE = 16
"""How many of them qemu-storage-daemon has at the NBD server at once."""
DEATHS = 250 if STRESS else 4
KILLS = 10 if STRESS else 1
"""Of DPDK's vhost, whose traffic keeps all processors at work."""
STARTS = 100 if STRESS else 3
"""Of a back-end that the airlock starts: with pauses of up to 5 s."""
GUESTS = 100
"""Of a disk's back-end under a guest's load, only in `make stress`."""
OFTEN = f"--recover-times={max(DEATHS, GUESTS) + 1}"


class Watched:
    """An airlock's account of itself."""

    def __init__(self, stats: Path) -> None:
        self.stats = stats

    def total(self, kind: str, name: str) -> int:
        document = parse(ask(str(self.stats)), str(self.stats))
        return document.total(kind, name)

    def await_progress(self) -> None:
        """Wait until some more requests are done, and some are in flight."""
        done = self.total("ring", "completions")
        wait_until(
            lambda: (
                self.total("ring", "completions") > done + 50
                and self.total("ring", "outstanding") > 0
            ),
            "requests are done",
        )

    @property
    def losses(self) -> int:
        return self.total("backend", "losses")


class Mortal(Watched):
    """A disk's back-end that dies and comes back, behind an airlock."""

    def __init__(self, programs: Programs, disk: Disk, folder: Path) -> None:
        self.programs = programs
        self.disk = disk
        self.back = folder / "back.sock"
        self.front = folder / "front.sock"
        super().__init__(folder / "stats.sock")
        self.daemon: StorageDaemon | None = None

    @contextmanager
    def served(self) -> Iterator[Process]:
        options = ("--device-type=block", f"--stats-path={self.stats}", OFTEN)
        with ExitStack() as stack:
            stack.callback(self.kill)
            self.start()
            yield stack.enter_context(airlock(self.back, self.front, *options))

    def start(self) -> None:
        self.back.unlink(missing_ok=True)
        self.daemon = start_daemon(self.programs, self.disk, self.back)

    def kill(self) -> None:
        if self.daemon is not None:
            self.daemon.kill()


@pytest.mark.parametrize("aio", ["threads", "io_uring"])
@pytest.mark.parametrize("direct", [False, True], ids=["cached", "uncached"])
def test_disk_under_verified_load(programs, drive, folder, aio, direct):
    """libblkio's program knows what each sector must hold."""
    image = folder / "disk.img"
    image.write_bytes(bytes(32 * MIB))
    disk = Disk(image, queues=2, direct=direct, aio=aio)
    mortal = Mortal(programs, disk, folder)
    options = {"queues": 2, "qd": 8, "passes": 10**6, "max": 128 << 10}
    with mortal.served() as proxy:
        held = []
        with drive.start(mortal.front, "verify", **options) as load:
            for _ in range(DEATHS):
                mortal.await_progress()
                mortal.kill()
                mortal.start()
                mortal.await_progress()
                assert not load.ended(), load.describe()
                held.append(held_by(proxy))
            assert mortal.losses == DEATHS
            assert held[-1][:2] == held[1][:2], "descriptors and threads"
            assert held[-1][2] - held[1][2] < MIB, "memory"
            print(f"{DEATHS} losses: {held[1]} after the second, {held[-1]} at the end")
            load.popen.send_signal(signal.SIGUSR1)
            assert load.wait(timeout=100) == 0, load.describe()


def test_airlock_starts_its_back_end_again(programs, drive, folder):
    """After pauses that double, since it fails soon after its start each time."""
    image = folder / "disk.img"
    image.write_bytes(bytes(32 * MIB))
    disk = Disk(image)
    front, stats = folder / "front.sock", folder / "stats.sock"
    command = programs(
        "qemu-storage-daemon",
        *("--blockdev", disk.blockdev()),
        "--export",
        "type=vhost-user-blk,id=export,node-name=disk,writable=on,"
        "addr.type=fd,addr.str={listen-fd}",
    )
    options = ("--device-type=block", f"--stats-path={stats}", OFTEN)
    watched = Watched(stats)
    with (
        airlock(None, front, *options, command=command) as proxy,
        drive.start(front, "verify", qd=8, passes=10**6, max=128 << 10) as load,
    ):
        for _ in range(STARTS):
            watched.await_progress()
            (pid,) = daemons(image)
            os.kill(pid, signal.SIGKILL)
        watched.await_progress()
        assert watched.losses == STARTS
        load.popen.send_signal(signal.SIGUSR1)
        assert load.wait(timeout=100) == 0, load.describe()
        assert proxy.output().count("ended: signal 9") == STARTS


def held_by(process: Process) -> tuple[int, int, int]:
    """Its descriptors, its threads, and its own memory in bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    words = dict(line.split(":", 1) for line in status.splitlines())
    own = int(words["RssAnon"].split()[0]) << 10
    return len(os.listdir(f"/proc/{process.pid}/fd")), int(words["Threads"]), own


def daemons(image: Path) -> list[int]:
    """The numbers of the processes of qemu-storage-daemon that have this image."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (each / "cmdline").read_bytes()
            if (
                words.startswith(b"qemu-storage-daemon")
                and str(image).encode() in words
            ):
                found.append(int(each.name))
    return found


def test_vsock_takes_new_connections(programs, folder):
    """QEMU's own connection to a vsock's back-end never comes back."""
    host, back = folder / "host", folder / "vsock.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{host}_5000")
    server = streams.Server(listener)
    to_host = ["vsock", socket.VMADDR_CID_HOST, 5000]
    program = programs.find("vhost-device-vsock")
    argv = (f"--socket={back}", f"--uds-path={host}", "--guest-cid=3")
    log = folder / "vsock.log"
    with ExitStack() as stack:
        daemon = stack.enter_context(Process(programs(program, *argv), log))
        daemon.wait_until(lambda: listening(back))
        options = ("--device-type=vsock", OFTEN)
        front = folder / "front.sock"
        stack.enter_context(airlock(back, front, *options))
        guest = stack.enter_context(Guest(programs, folder, devices.vsock(front)))
        for _ in range(3):
            guest.call(streams.take_from, to_host, 2, MIB)
            guest.call(streams.give_to, to_host, 1, MIB)
            daemon.kill()
            for path in (back, host):
                path.unlink(missing_ok=True)
            daemon = stack.enter_context(Process(programs(program, *argv), log))
        guest.call(streams.connect_many, to_host, 5, 5)
        guest.power_off()
    server.close()
    assert server.failures == []


def test_packets_go_on(programs, folder):
    """DPDK's virtio-user does not know that DPDK's vhost is killed and started again.

    Packets of its last moments are lost, or come twice; none comes with other bytes.
    """
    path, front_path = folder / "back.sock", folder / "front.sock"
    ours = PacketFiles(folder / "ours", [list(frames(0, 500, 200))], endless=True)
    with ExitStack() as stack:

        def start(number: int) -> Testpmd:
            path.unlink(missing_ok=True)
            log = folder / f"back-{number}.log"
            made = stack.enter_context(Testpmd(programs, log, [vhost(path)]))
            # It drops what there is no room for: once the front-end stops to receive,
            # each end could wait for ever until the other one makes room.
            made("set fwd io")
            made("start")
            return made

        back = start(0)
        stats = folder / "stats.sock"
        options = ("--device-type=net", f"--stats-path={stats}")
        stack.enter_context(airlock(path, front_path, *options))
        watched = Watched(stats)
        log, devices = folder / "front.log", [f"net_virtio_user0,path={front_path}"]
        front = stack.enter_context(Testpmd(programs, log, [*devices, ours.device]))
        front("start")
        for number in range(1, KILLS + 1):
            watched.await_progress()
            back.kill()
            back = start(number)
            watched.await_progress()
            assert watched.losses == number
        received, _ = front.counted()[0]
        front.wait_until(lambda: front.counted()[0][0] > received, timeout=60)
        front.quit()
    (kept,) = ours.kept()
    assert set(kept) <= set(ours.packets[0])
    assert len(kept) > len(ours.packets[0])


def test_guest_sees_a_pause(programs, folder):
    """80 requests are in flight when the back-end dies, 16 of them at its server."""
    path = folder / "nbd.sock"
    with stalling_nbd(path, blocks.image(COUNT)) as nbd:
        mortal = Mortal(programs, NbdDisk(server=path, queues=2), folder)
        with (
            mortal.served(),
            booted(programs, folder, devices.disk(mortal.front), cpus=2) as guest,
        ):
            nbd.stall()
            guest.call(blocks.start, COUNT, 1)
            nbd.wait_for_kept(AT_ONCE)
            mortal.kill()
            nbd.go_on_without_client()
            mortal.start()
            assert guest.call(blocks.finish) == []
            blocks.check(nbd.content, COUNT, 1)
            assert mortal.losses == 1
            guest.power_off()


if STRESS:  # minutes

    def test_guest_sees_pauses_under_load(programs, folder, capsys):
        """The back-end dies with requests in flight, as soon as some more are done. The
        guest finds no wrong byte and no error.
        """
        image = folder / "disk.img"
        image.write_bytes(bytes(64 * MIB))
        mortal = Mortal(programs, Disk(image, queues=2), folder)
        disk = devices.disk(mortal.front)
        with (
            mortal.served(),
            Guest(programs, folder, disk, devices.FIO, cpus=2, memory="384M") as guest,
        ):
            guest.call(fio.start, 2)
            for _ in range(GUESTS):
                guest.call(fio.busy)
                mortal.kill()
                mortal.start()
                guest.call(fio.progress)
            rounds = guest.call(fio.stop)
            assert mortal.losses == GUESTS
            guest.power_off()
        assert rounds > 0
        with capsys.disabled():
            print(f"\n{GUESTS} losses, {rounds} rounds of verified load")
