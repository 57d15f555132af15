# SPDX-License-Identifier: Apache-2.0
"""Sees every load and store that compiled code makes to some memory, with its width.

watch.c catches them one by one; how wide each is stands in the instruction, which
objdump reads for us. All of it is done by an ordinary user, on x86-64 only.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

SHOTS = 1024
"""The most stores of which shots are taken."""

CAN_WATCH = platform.machine() == "x86_64"

VECTORS = {"x": 16, "y": 32, "z": 64}
"""Width in bytes by a vector register's first letter."""

SUFFIXES = {"b": 1, "w": 2, "l": 4, "q": 8}
"""Width in bytes by the last letter of a mnemonic."""

SCALARS = {"movd": 4, "movq": 8, "vmovd": 4, "vmovq": 8, "movhps": 8, "movlps": 8}
"""Vector instructions that don't take the whole of their register."""


class Access(NamedTuple):
    address: int
    width: int
    write: bool
    instruction: int
    """Where the instruction is."""

    @property
    def bytes(self) -> range:
        return range(self.address, self.address + self.width)


class _Noted(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("instruction", ctypes.c_uint64),
        ("write", ctypes.c_uint64),
    )


class Watcher:
    def __init__(self, folder: Path) -> None:
        """Compiles watch.c into this folder."""
        library = folder / "watch.so"
        source = Path(__file__).with_name("watch.c")
        command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
        subprocess.run([*command, "-o", library, source], check=True)
        # PyDLL keeps the interpreter's lock: no other thread runs in between.
        self.library = ctypes.PyDLL(str(library))

    def during(
        self, call: Callable[[], object], pieces: Iterable[tuple[int, int]]
    ) -> list[Access]:
        """What `call` does to these pieces of memory: (address, size), whole pages."""
        noted = ctypes.POINTER(_Noted)()
        for address, size in pieces:
            added = self.library.add_region(
                ctypes.c_void_p(address), ctypes.c_size_t(size)
            )
            assert added == 0, "too many pieces to watch"
        self.library.watch()
        try:
            call()
        finally:
            count = self.library.unwatch(ctypes.byref(noted))
        return [
            Access(
                noted[i].address,
                width_of(instruction_at(noted[i].instruction)),
                bool(noted[i].write),
                noted[i].instruction,
            )
            for i in range(count)
        ]

    def shots_during(
        self, call: Callable[[], object], pieces: Sequence[tuple[int, int]]
    ) -> list[list[bytes]]:
        """The content of these pieces of memory before `call` and after each store that
        it makes there: all that would be left if it ended at some instruction."""
        sizes = [size for _, size in pieces]
        before = [ctypes.string_at(address, size) for address, size in pieces]
        room = mmap.mmap(-1, SHOTS * sum(sizes))  # of which only pages in use cost time
        start = ctypes.addressof(ctypes.c_char.from_buffer(room))
        self.library.set_shots(ctypes.c_void_p(start), ctypes.c_size_t(len(room)))
        stores = sum(access.write for access in self.during(call, pieces))
        found, at = [before], 0
        for _ in range(stores):
            shot = []
            for size in sizes:
                shot.append(room[at : at + size])
                at += size
            found.append(shot)
        return found


def code_at(address: int) -> tuple[str, int]:
    """The file that is mapped at an address of ours, and the offset in it."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        area, _, offset, _, _, *path = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in area.split("-"))
        if start <= address < end:
            return path[0], address - start + int(offset, 16)
    raise LookupError(f"no code at {address:#x}")


@cache
def instruction_at(address: int) -> str:
    """The instruction there, as objdump writes it: mnemonic and operands."""
    file, offset = code_at(address)
    # Code lies in its file where it lies in memory, for all that we look at.
    output = subprocess.run(
        [
            *("objdump", "-d", "--no-show-raw-insn", "--section=.text"),
            f"--start-address={offset}",
            f"--stop-address={offset + 16}",
            file,
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = re.search(rf"^\s*{offset:x}:\s+(.+?)\s*(?:#.*)?$", output, re.M)
    assert found, f"objdump finds no instruction at {offset:#x} of {file}"
    return found[1]


def width_of(instruction: str) -> int:
    """How many bytes of memory an instruction reads or writes."""
    mnemonic, _, operands = instruction.partition(" ")
    if mnemonic in ("lock", "rep"):
        mnemonic, _, operands = operands.strip().partition(" ")
    if mnemonic in SCALARS and "%xmm" in operands:
        return SCALARS[mnemonic]
    if extended := re.fullmatch(r"mov[sz]([bw])[wlq]", mnemonic):
        return SUFFIXES[extended[1]]
    if mnemonic == "movslq":
        return 4
    registers = re.findall(r"%(\w+)", re.sub(r"\([^)]*\)", "", operands))
    for register in registers:
        if found := re.fullmatch(r"([xyz])mm\d+", register):
            return VECTORS[found[1]]
    if registers:
        return register_width(registers[0])
    return SUFFIXES[mnemonic[-1]]


def register_width(name: str) -> int:
    if re.fullmatch(r"[a-d][lh]|[sd]il|[sb]pl|r\d+b", name):
        return 1
    if re.fullmatch(r"[a-d]x|[sd]i|[sb]p|r\d+w", name):
        return 2
    if re.fullmatch(r"e[a-d]x|e[sd]i|e[sb]p|r\d+d", name):
        return 4
    assert re.fullmatch(r"r[a-d]x|r[sd]i|r[sb]p|r\d+", name), f"unknown register {name}"
    return 8
