# SPDX-License-Identifier: Apache-2.0
"""Verifying I/O on the disk while the test does things to the machine or the device.

fio writes in rounds: blocks of mixed sizes at random, many at a time, from one thread
for each queue, and reads back what it wrote, partly while it goes on writing.
"""

import os
import random
import subprocess
import threading

from tests.guest.inside.agent import sh
from tests.guest.inside.waiting import wait

DEVICE = "/dev/vda"
MIB = 1 << 20
SIZE = 4 * MIB
"""Of each thread's part of the disk. They lie one after the other."""

KEPT = 60 * MIB
"""Where something lies that fio leaves alone."""

JOB = f"""
[global]
filename={DEVICE}
allow_file_create=0
direct=1
ioengine=io_uring
iodepth=32
thread=1
rw=randwrite
bssplit=512/10:4k/40:12k/20:64k/20:256k/10
size={SIZE}
verify=crc32c-intel
verify_backlog=64
verify_fatal=1
verify_dump=0
randrepeat=0
"""


class Load:
    """Rounds of fio in a thread, until it is stopped or fails."""

    def __init__(self, jobs: int) -> None:
        self.rounds = 0
        self.failure = ""
        self.fio: subprocess.Popen[str] | None = None
        self.stopping = False
        self.changed = threading.Condition()
        lines = [JOB]
        for job in range(jobs):
            lines.append(f"[{job}]\noffset={job * SIZE}\ncpus_allowed={job}\n")
        with open("/tmp/job", "w") as file:
            file.write("".join(lines))
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while not self.stopping and not self.failure:
            with subprocess.Popen(
                ["/tools/fio", "--output-format=terse", "/tmp/job"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as self.fio:
                said = self.fio.communicate()[0]
            with self.changed:
                if self.fio.returncode:
                    self.failure = f"fio: status {self.fio.returncode}\n{said}"
                else:
                    self.rounds += 1
                self.changed.notify()

    def wait_for_rounds(self, wanted: int, timeout: float) -> None:
        with self.changed:
            self.changed.wait_for(
                lambda: self.failure or self.rounds >= wanted, timeout
            )
        if self.failure:
            raise RuntimeError(self.failure)
        if self.rounds < wanted:
            raise TimeoutError(f"{self.rounds} rounds in {timeout} s, not {wanted}")


_load: list[Load] = []


def start(jobs: int) -> None:
    """Begin; the second round would notice if the first one were not kept."""
    _load.append(Load(jobs))


def go_on(rounds: int = 1, timeout: float = 100) -> None:
    """Wait until this many more rounds are over, and were good."""
    load = _load[-1]
    load.wait_for_rounds(load.rounds + rounds, timeout)


def busy() -> None:
    """Wait until many requests are in flight."""
    wait(lambda: requests() >= 8, lambda: f"{requests()} requests in flight")


def progress(count: int = 20) -> None:
    """Wait until so many more requests are done, whenever they were begun."""
    before = completed()
    wait(
        lambda: completed() >= before + count or bool(_load[-1].failure),
        lambda: f"{completed() - before} requests are done, not {count}",
    )
    if _load[-1].failure:
        raise RuntimeError(_load[-1].failure)


def completed() -> int:
    """How many reads and writes the disk's driver has seen done."""
    with open("/sys/block/vda/stat") as file:
        fields = file.read().split()
    return int(fields[0]) + int(fields[4])


def requests() -> int:
    """How many requests the disk's driver has, now."""
    with open("/sys/block/vda/inflight") as file:
        return sum(map(int, file.read().split()))


def stop() -> int:
    """Wait for the end of the round: how many there were, all good."""
    load = _load.pop()
    load.stopping = True
    load.thread.join()
    load.wait_for_rounds(load.rounds, 0)
    return load.rounds


def lose() -> str:
    """The device goes away under it: wait for it to fail, and forget it."""
    load = _load.pop()
    load.thread.join(60)
    assert load.failure, "nothing failed"
    return load.failure


def discard(start: int, size: int) -> None:
    """Give a part of the disk up, by DISCARD."""
    sh(f"/tools/blkdiscard -o {start} -l {size} {DEVICE}")


def zero(start: int, size: int) -> None:
    """Fill a part of the disk with zeros, by WRITE ZEROES."""
    sh(f"/tools/blkdiscard -z -o {start} -l {size} {DEVICE}")


def wait_for_size(size: int) -> None:
    """Wait until the disk has this size in bytes."""

    def found() -> int:
        with open("/sys/block/vda/size") as file:
            return int(file.read()) * 512

    wait(lambda: found() == size, lambda: f"{found()} bytes, not {size}")


def keep(seed: int) -> None:
    """Write something beside what fio does, and make it last."""
    with open(DEVICE, "r+b", buffering=0) as disk:
        disk.seek(KEPT)
        disk.write(random.Random(seed).randbytes(MIB))
        os.fsync(disk.fileno())


def check_kept(seed: int) -> None:
    with open(DEVICE, "rb", buffering=0) as disk:
        disk.seek(KEPT)
        if disk.read(MIB) != random.Random(seed).randbytes(MIB):
            raise ValueError("what was kept is not there")


def unbind() -> str:
    """Take the disk away from its driver: which one it was."""
    name = os.path.basename(os.readlink("/sys/block/vda/device"))
    sh(f"echo {name} > /sys/bus/virtio/drivers/virtio_blk/unbind")
    return name


def bind(name: str) -> None:
    sh(f"echo {name} > /sys/bus/virtio/drivers/virtio_blk/bind")


def wait_for_disk(there: bool = True) -> None:
    """Wait until it is there, or gone."""
    wait(
        lambda: os.path.exists(DEVICE) == there,
        lambda: f"{DEVICE} is {'not ' * there}there",
    )
