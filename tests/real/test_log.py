# SPDX-License-Identifier: Apache-2.0
"""The log that an operator sees with QEMU: the transcripts in docs/operating.md."""

import json
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.real.airlock import airlock
from tests.real.backends import virtiofsd_command
from tests.real.processes import Process, listening
from tests.real.programs import PROJECT, Programs
from tests.real.qtest import MEMFD, RAM, QtestMachine, VirtioDevice
from tests.real.storage import Disk, storage_daemon
from tests.support.backs import wait_until
from vhost_airlock.errors import Disconnected
from vhost_airlock.peers.disk import HEADER, SECTOR, BlkType
from vhost_airlock.vhost.frontend import Frontend

INFO = "--log-level=info"
DEVICE = "vhost-user-blk-pci-non-transitional,chardev=front"
DOCUMENT = (PROJECT / "docs" / "operating.md").read_text()


def transcript(title: str) -> list[str]:
    """The lines of the block below these words in the document."""
    match = re.search(
        rf"^\*\*{re.escape(title)}\*\*.*?```\n(.*?)```", DOCUMENT, re.M | re.S
    )
    assert match, f"no transcript {title!r}"
    return plain(match[1])


def plain(text: str) -> list[str]:
    """Its lines, without the numbers and folders that differ from run to run."""
    for pattern, word in (
        (r".*: isolated in vain, .*\n", ""),  # all processes here are root's
        (r"/\S+/", "FOLDER/"),
        (r"process \d+", "process N"),
        (r"user \d+", "user N"),
        (r"after \d+\.\d s", "after T s"),
        (r"0x[0-9a-f]+", "BITS"),
    ):
        text = re.sub(pattern, word, text)
    return text.splitlines()


def disk_image(folder: Path) -> Disk:
    image = folder / "disk.img"
    image.write_bytes(bytes(1 << 20))
    return Disk(image)


def machine(
    programs: Programs, folder: Path, name: str = "qemu", memory: str = MEMFD
) -> QtestMachine:
    chardev = f"socket,id=front,path={folder}/disk.sock,reconnect-ms=100"
    return QtestMachine(
        programs, folder / f"{name}.log", [DEVICE], ("-chardev", chardev), memory=memory
    )


def started(machine: QtestMachine) -> VirtioDevice:
    disk = VirtioDevice(machine)
    disk.negotiate((1 << 64) - 1)
    disk.add_queue(0)
    disk.start()
    return disk


def write_and_read(disk: VirtioDevice) -> None:
    data = os.urandom(8 * SECTOR)
    request = HEADER.pack(BlkType.OUT, 0, 0) + data
    assert disk.request(0, request, writable=1) == b"\0"
    request = HEADER.pack(BlkType.IN, 0, 0)
    assert disk.request(0, request, writable=len(data) + 1) == data + b"\0"


def test_good_session(programs, folder):
    with (
        storage_daemon(programs, disk_image(folder), folder / "disk-back.sock") as (
            _,
            back,
        ),
        airlock(back, folder / "disk.sock", INFO) as proxy,
    ):
        with machine(programs, folder) as qemu:
            disk = started(qemu)
            write_and_read(disk)
            disk.reset()
        proxy.wait_until(lambda: "session ended" in proxy.output())
        assert proxy.stop() == 0
        assert plain(proxy.output()) == transcript("A good session")


def test_guest_memory_that_is_not_shared(programs, folder):
    memory = f"memory-backend-memfd,id=ram,size={RAM},share=off"
    with (
        storage_daemon(programs, disk_image(folder), folder / "disk-back.sock") as (
            _,
            back,
        ),
        airlock(back, folder / "disk.sock") as proxy,
        machine(programs, folder, memory=memory) as qemu,
        mmap.mmap(-1, RAM) as nobodys,
    ):
        qemu.use_ram(nobodys)
        disk = started(qemu)
        proxy.wait_until(lambda: "share=on" in proxy.output())
        disk.reset()
        assert plain(proxy.output()) == transcript("`share=on` was forgotten")


def test_back_end_that_ends(programs, folder):
    """The airlock starts it again, since QEMU connects again."""
    daemon = folder / "qemu-storage-daemon"
    disk = disk_image(folder)
    command = programs(
        "qemu-storage-daemon", "--blockdev", disk.blockdev(), "--export", '"$1"'
    )
    daemon.write_text(f"#!/bin/sh\nexec {' '.join(command)}\n")
    daemon.chmod(0o755)
    export = (
        "vhost-user-blk,id=disk,node-name=disk,writable=on"
        ",addr.type=fd,addr.str={listen-fd}"
    )
    with (
        airlock(None, folder / "disk.sock", command=[str(daemon), export]) as proxy,
        machine(programs, folder) as qemu,
    ):
        write_and_read(started(qemu))
        (pid,) = children(proxy)
        os.kill(pid, signal.SIGKILL)
        proxy.wait_until(lambda: "ended: signal 9" in proxy.output())
        assert plain(proxy.output()) == transcript("The back-end ended")
        proxy.wait_until(lambda: bool(children(proxy)))


def children(proxy: Process) -> list[int]:
    """The back-ends that the airlock's broker runs."""
    (broker,) = of(proxy.pid)
    return of(broker)


def of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def test_second_vmm(programs, folder):
    with (
        storage_daemon(programs, disk_image(folder), folder / "disk-back.sock") as (
            _,
            back,
        ),
        airlock(back, folder / "disk.sock") as proxy,
        machine(programs, folder) as qemu,
    ):
        disk = started(qemu)
        with machine(programs, folder, "second"):
            proxy.wait_until(lambda: "another VMM" in proxy.output())
            write_and_read(disk)
        disk.reset()
        assert plain(proxy.output()) == transcript("A second VMM")


@pytest.mark.parametrize("program", ["virtiofsd", "passt"])
def test_program_that_gets_the_wrong_kind_of_socket(programs, folder, program):
    """virtiofsd fails then, and passt ends with status 0."""
    commands = {
        "virtiofsd": virtiofsd_command(programs, folder, "--fd={fd}"),
        "passt": programs(
            programs.find("passt"), "--vhost-user", "--foreground", "--fd={listen-fd}"
        ),
    }
    front = folder / "disk.sock"
    with airlock(None, front, command=commands[program]) as proxy:
        with Frontend.connect(str(front)) as vmm, pytest.raises(Disconnected):
            vmm.get_features()
        proxy.wait_until(lambda: "and sent no message: does it take" in proxy.output())


@contextmanager
def journald(programs: Programs, folder: Path) -> Iterator[Path]:
    """The journal's own daemon; it listens at the path that is yielded."""
    mounts = ["mount -t tmpfs journal /run"]
    for name, place in (("journal", "systemd/journal"), ("log", "log/journal")):
        (folder / name).mkdir()
        mounts.append(f"mkdir -p /run/{place}")
        mounts.append(f"mount --bind {folder / name} /run/{place}")
    start = " && ".join([*mounts, "exec /usr/lib/systemd/systemd-journald"])
    with Process(programs("sh", "-c", start), folder / "journald.log") as process:
        path = folder / "journal" / "stdout"
        process.wait_until(path.exists)
        yield path


END = "disk.sock: SIGTERM: the airlock ends"


def await_journal(programs: Programs, folder: Path, text: str) -> list[tuple[str, str]]:
    """The airlock's lines there, with their priorities, once this one has come."""
    for _ in range(100):
        found = journal(programs, folder)
        if any(text == line for _, line in found):
            return found
    raise AssertionError(f"no {text!r}, but {found}")


def journal(programs: Programs, folder: Path) -> list[tuple[str, str]]:
    """The airlock's lines there, with their priorities."""
    shown = subprocess.run(
        programs("journalctl", f"--directory={folder}/log", "--output=json"),
        capture_output=True,
        text=True,
        check=True,
    )
    entries = [json.loads(line) for line in shown.stdout.splitlines()]
    return [
        (entry["PRIORITY"], entry["MESSAGE"])
        for entry in entries
        if entry.get("SYSLOG_IDENTIFIER") == "vhost-airlock"
    ]


def test_journal_knows_the_level_of_each_line(programs, folder):
    """The airlock's stderr is connected to it, as systemd does that for a service."""
    with (
        journald(programs, folder) as path,
        socket.socket(socket.AF_UNIX) as stderr,
    ):
        stderr.connect(str(path))
        header = ["vhost-airlock", "", "6", "1", "0", "0", "0"]
        stderr.sendall("".join(f"{field}\n" for field in header).encode())
        found = os.fstat(stderr.fileno())
        command = [
            *("env", f"JOURNAL_STREAM={found.st_dev}:{found.st_ino}"),
            *(sys.executable, "-m", "vhost_airlock", "run", INFO),
            *(f"--socket-path={folder}/disk.sock", f"--backend={folder}/back.sock"),
        ]
        with subprocess.Popen(command, stderr=stderr.fileno()) as process:
            front = folder / "disk.sock"
            wait_until(lambda: listening(front) or process.poll() is not None, "there")
            process.terminate()
            assert process.wait(timeout=10) == 0
        told = {text: level for level, text in await_journal(programs, folder, END)}
    late = f"disk.sock: no back-end at {folder}/back.sock: No such file or directory"
    assert told[f"{late}; waiting for it"] == "4"
    assert told[f"disk.sock: listening for the VMM at {front}"] == "6"
    assert told[END] == "6"
