# SPDX-License-Identifier: Apache-2.0
"""Real back-ends take the place of each other, by `vhost-airlock swap`. The front-ends,
which know nothing of it, only wait.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.guest import devices
from tests.guest.booted import booted
from tests.guest.inside import files, held
from tests.real.airlock import airlock
from tests.real.backends import virtiofsd_command
from tests.real.blkdrive import BlkDrive
from tests.real.processes import Process
from tests.real.programs import PROJECT
from tests.real.storage import Disk, start_daemon
from tests.real.test_recovery import Watched, daemons
from tests.support.profiles import STRESS

MIB = 1 << 20
SWAPS = 100 if STRESS else 3
LOAD = {"queues": 2, "qd": 8, "passes": 10**6, "max": 128 << 10}


def swapped(control: Path, *words: str | Path) -> float:
    """Swap; the seconds in which the guest's queues stood."""
    done = swap(control, *words)
    assert done.returncode == 0, done.stderr
    found = re.search(r"stood for ([\d.]+) s", done.stdout)
    assert found is not None, done.stdout
    return float(found[1])


def swap(control: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "vhost_airlock", "swap", str(control))
    return subprocess.run(
        [*command, *map(str, words)], capture_output=True, check=False, text=True
    )


@contextmanager
def under_load(drive: BlkDrive, front: Path, watched: Watched) -> Iterator[None]:
    """libblkio's program, which knows what each sector must hold, all the time."""
    with drive.start(front, "verify", **LOAD) as load:
        watched.await_progress()
        yield
        watched.await_progress()
        assert not load.ended(), load.describe()
        assert watched.losses == 0
        assert watched.total("backend", "swaps") == SWAPS
        load.popen.send_signal(signal.SIGUSR1)
        assert load.wait(timeout=100) == 0, load.describe()


def tell(capsys: pytest.CaptureFixture[str], name: str, pauses: list[float]) -> None:
    """Print the longest pause, for whoever wants to know how long it is."""
    with capsys.disabled():
        print(f"\n{name}: {len(pauses)} swaps, longest pause {max(pauses):.3f} s")


def test_disk_by_path_under_verified_load(programs, drive, folder, capsys):
    """Two daemons have the image at the same time, and only one of them is used."""
    image = folder / "disk.img"
    image.write_bytes(bytes(32 * MIB))
    disk = Disk(image, queues=2, locking="off")
    front, control = folder / "front.sock", folder / "control.sock"
    options = ("--device-type=block", f"--control-path={control}")
    back = folder / "0.sock"
    daemon = start_daemon(programs, disk, back)
    pauses = []
    try:
        with (
            airlock(back, front, *options) as proxy,
            under_load(drive, front, Watched(control)),
        ):
            for number in range(1, SWAPS + 1):
                old, back = daemon, folder / f"{number}.sock"
                daemon = start_daemon(programs, disk, back)
                pauses.append(swapped(control, f"--backend={back}"))
                assert old.stop() == 0, old.describe()
                old.kill()
                Watched(control).await_progress()
            assert "lost" not in proxy.output()
    finally:
        daemon.kill()
    tell(capsys, "qemu-storage-daemon by path", pauses)


def test_disk_by_command_under_verified_load(programs, drive, folder, capsys):
    """With locks on the image: the old one has ended when the new one is started."""
    image = folder / "disk.img"
    image.write_bytes(bytes(32 * MIB))
    export = "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2"
    command = programs(
        "qemu-storage-daemon",
        *("--blockdev", Disk(image).blockdev()),
        *("--export", f"{export},addr.type=fd,addr.str={{listen-fd}}"),
    )
    front, control = folder / "front.sock", folder / "control.sock"
    options = ("--device-type=block", f"--control-path={control}")
    pauses = []
    with (
        airlock(None, front, *options, command=command),
        under_load(drive, front, Watched(control)),
    ):
        seen = set(daemons(image))
        for _ in range(SWAPS):
            pauses.append(swapped(control, "--", *command))
            (pid,) = daemons(image)
            assert pid not in seen
            seen.add(pid)
            Watched(control).await_progress()
        # One that can't start leaves the old one's command in force.
        refused = swap(control, "--", *command[:-1], f"{command[-1]},nonsense=on")
        assert refused.returncode == 1
        assert "the last back-end was taken again" in refused.stderr
        Watched(control).await_progress()
        assert len(daemons(image)) == 1
    tell(capsys, "qemu-storage-daemon by command", pauses)


OPERATING = PROJECT / "docs" / "operating.md"


def documented(words: str) -> list[str]:
    """The options of the command in the document that begins with these words, from
    virtiofsd's --migration-mode on.
    """
    (line,) = re.findall(f"^{re.escape(words)}.*", OPERATING.read_text(), re.MULTILINE)
    _, found, options = line.partition("--migration-mode")
    return f"{found}{options}".split()


@contextmanager
def shared(folder: Path, command: list[str], control: Path) -> Iterator[Process]:
    """An airlock that starts virtiofsd for the share, which has a file to copy."""
    options = ("--device-type=fs", f"--control-path={control}")
    with airlock(None, folder / "fs.front", *options, command=command) as proxy:
        yield proxy


def test_open_files_of_a_guest_stay_open(programs, folder, capsys):
    """One of them is unlinked, one is locked, and a copy runs."""
    share, control, size = folder / "share", folder / "control.sock", 128 * MIB
    share.mkdir()
    files.write_big(str(share / "source"), 1, size)
    options = documented("vhost-airlock run --socket-path=share.sock")
    assert documented("vhost-airlock swap /run/share.control") == options != []
    command = virtiofsd_command(programs, share, "--fd={listen-fd}", *options)
    pauses, ran = [], 0
    with (
        shared(folder, command, control),
        booted(
            programs, folder, devices.file_system(folder / "fs.front", "share")
        ) as guest,
    ):
        guest.sh("mount -t virtiofs share /mnt")
        guest.call(held.begin, "/mnt", True)
        for _ in range(SWAPS):
            pauses.append(swapped(control, "--", *command))
            ran += guest.call(held.use)
        assert ran > 0, "the copy ran while virtiofsd was swapped"
        assert guest.call(held.end) == 0
        assert Watched(control).total("backend", "swaps") == SWAPS
        guest.sh("umount /mnt")
        guest.power_off()
    files.check_big(str(share / "copy"), 1, size)
    tell(capsys, "virtiofsd", pauses)


if STRESS:  # a guest more

    def test_files_that_can_not_be_carried_over_keep_the_old_one(programs, folder):
        """It can't tell of an unlinked file by its path, says so, and goes on."""
        share, control = folder / "share", folder / "control.sock"
        share.mkdir()
        files.write_big(str(share / "source"), 1, MIB)
        command = virtiofsd_command(programs, share, "--fd={listen-fd}")
        with (
            shared(folder, command, control),
            booted(
                programs, folder, devices.file_system(folder / "fs.front", "share")
            ) as guest,
        ):
            guest.sh("mount -t virtiofs share /mnt")
            guest.call(held.begin, "/mnt", True)
            refused = swap(control, "--", *command)
            assert refused.returncode == 1
            assert refused.stderr == (
                "vhost-airlock: not swapped: state, at the new back-end:"
                " CHECK_DEVICE_STATE: the back-end says that it went wrong\n"
            )
            guest.call(held.use)
            assert guest.call(held.end) == 0
            guest.power_off()
        files.check_big(str(share / "copy"), 1, MIB)
