# SPDX-License-Identifier: Apache-2.0
"""The search for a marker finds it wherever another process holds it, and only then."""

import mmap
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vhost_airlock.peers.scan import CHUNK, descriptors, mappings, search

SIZE = 64 << 20
AT = (8 << 20) + CHUNK - 7
"""Where the marker is: across the border of two reads, behind a hole."""


root_only = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root sees files behind mappings"
)


@pytest.fixture
def marker() -> bytes:
    return secrets.token_bytes(16)


@pytest.fixture
def ram(marker: bytes):
    fd = os.memfd_create("guest-ram")
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, bytes(CHUNK), 8 << 20)
    os.pwrite(fd, marker, AT)
    yield fd
    os.close(fd)


@contextmanager
def holder(ram: int, code: str) -> Iterator[int]:
    """A process that inherits the memory and runs some code: its id."""
    program = f"import mmap, os, sys; ram = {ram}\n{code}\nprint(flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{program}\nsys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[ram],
        # A sanitizer would give it terabytes of memory to search.
        env={name: os.environ[name] for name in os.environ if name != "LD_PRELOAD"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield process.pid


def places(pid: int, marker: bytes) -> list[tuple[str, str, int]]:
    scan = search(pid, [b"another marker, absent", marker])
    assert scan.searched > 0
    assert {found.marker for found in scan.found} <= {marker}
    return [(found.holding.kind, found.holding.name, found.at) for found in scan.found]


def test_open_descriptor(ram, marker):
    with holder(ram, "") as pid:
        assert places(pid, marker) == [("fd", "memfd:guest-ram", AT)]


def test_descriptor_and_mapping_are_one_file(ram, marker):
    with holder(ram, f"kept = mmap.mmap(ram, {SIZE})") as pid:
        assert places(pid, marker) == [("fd", "memfd:guest-ram", AT)]


def test_mapping_without_descriptor(ram, marker):
    # mmap objects keep a duplicate of their descriptor, which is the first one free
    with holder(ram, f"m = mmap.mmap(ram, {SIZE}); os.closerange(3, 10_000)") as pid:
        (found,) = places(pid, marker)
        assert found[:2] == ("mapping", "memfd:guest-ram")


@root_only
def test_rest_of_a_file_that_is_mapped_in_part(ram, marker):
    with holder(ram, "m = mmap.mmap(ram, 4096); os.closerange(3, 10_000)") as pid:
        assert places(pid, marker) == [("mapping", "memfd:guest-ram", AT)]


@root_only
def test_mapping_at_a_low_address(ram, marker):
    """Where programs that are not position-independent lie; maps pads the address."""
    fixed = mmap.MAP_SHARED | 0x100000  # MAP_FIXED_NOREPLACE
    code = f"""
import ctypes
call = ctypes.CDLL(None).mmap
call.argtypes = [ctypes.c_size_t] * 6
assert call(0x100000, 4096, {mmap.PROT_READ}, {fixed}, ram, 0) & 0xffffffff == 0x100000
os.closerange(3, 10_000)"""
    with holder(ram, code) as pid:
        assert places(pid, marker) == [("mapping", "memfd:guest-ram", AT)]
        (mapped,) = (each for each in mappings(pid) if each.name == "memfd:guest-ram")
        assert mapped.place == "00100000-00101000"


def test_copy_in_anonymous_memory(ram, marker):
    copy = f"m = mmap.mmap(-1, 4096); os.preadv(ram, [m], {AT}); os.close(ram)"
    with holder(ram, copy) as pid:
        (found,) = places(pid, marker)
        assert found[0] == "mapping"
        assert "guest-ram" not in found[1]


def test_nothing_held(ram, marker):
    with holder(ram, "os.close(ram)") as pid:
        assert places(pid, marker) == []


def test_lists_what_is_held(ram):
    with holder(ram, f"m = mmap.mmap(ram, {SIZE})") as pid:
        held = {holding.place: holding for holding in descriptors(pid)}
        assert (held[str(ram)].name, held[str(ram)].size) == ("memfd:guest-ram", SIZE)
        assert held["0"].size == 0
        mapped = [each for each in mappings(pid) if each.name == "memfd:guest-ram"]
        assert [each.size for each in mapped] == [SIZE]
        assert str(mapped[0]).endswith(f"memfd:guest-ram ({SIZE} bytes)")
