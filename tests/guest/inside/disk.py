# SPDX-License-Identifier: Apache-2.0
"""A guest fills its disk, and finds the same after a reboot."""

import filecmp
import mmap
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.guest.inside.agent import sh

PAYLOAD_SIZE = 4 << 20
PARTITIONS = 2048 * 512, 100352 * 512
"""Where the two partitions begin: a file system, and just the payload."""
TABLE = "label: dos\\nstart=2048, size=98304\\nstart=100352\\n"
BLOCK = 1 << 16


def payload() -> bytes:
    return random.Random("payload").randbytes(PAYLOAD_SIZE)


def small_files() -> dict[str, bytes]:
    data = payload()
    return {f"small/{i}": data[i * 37 + 1 : 2 * (i * 37 + 1)] for i in range(200)} | {
        "whole": data
    }


def parallel_files() -> dict[str, bytes]:
    """They are written at the same time, past the cache."""
    data = payload()
    return {f"parallel/{i}": data[i << 19 :][: 1 << 20] for i in range(4)}


def queues() -> int:
    return len(os.listdir("/sys/block/vda/mq"))


def fill() -> None:
    sh(f"printf '{TABLE}' | /tools/sfdisk --quiet --no-tell-kernel /dev/vda")
    sh("blockdev --rereadpt /dev/vda")
    sh("/tools/mke2fs -q -t ext4 /dev/vda1 && mount -t ext4 /dev/vda1 /mnt")
    sh("mkdir /mnt/small /mnt/parallel")
    for name, data in small_files().items():
        Path("/mnt", name).write_bytes(data)
    parallel = parallel_files()
    with ThreadPoolExecutor(len(parallel)) as pool:
        paths = [f"/mnt/{name}" for name in parallel]
        list(pool.map(write_direct, paths, parallel.values()))
    sh("sync && umount /mnt")
    write_direct("/dev/vda2", payload())


def check() -> None:
    sh("mount -t ext4 /dev/vda1 /mnt")
    for name, data in (small_files() | parallel_files()).items():
        if Path("/mnt", name).read_bytes() != data:
            raise ValueError(f"{name} is not what was written")
    sh("cp -r /mnt/small /mnt/second")
    if filecmp.dircmp("/mnt/small", "/mnt/second").diff_files:
        raise ValueError("the copy differs")
    sh("umount /mnt && /tools/e2fsck -f -n /dev/vda1")
    with open("/dev/vda2", "rb") as partition:
        if partition.read(PAYLOAD_SIZE) != payload():
            raise ValueError("the second partition is not what was written")


def write_direct(path: str, data: bytes) -> None:
    """Write past the cache, which takes aligned memory."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o644)
    with mmap.mmap(-1, BLOCK) as block:
        for start in range(0, len(data), BLOCK):
            block[:] = data[start : start + BLOCK]
            os.write(fd, block)
    os.close(fd)
