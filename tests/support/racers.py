# SPDX-License-Identifier: Apache-2.0
"""A guest and a back in C, which race with the data plane at its own speed.

Each runs in a thread, and ctypes lets go of the interpreter's lock for it. What they do
is told in racers.c, which is compiled when a test wants it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.plane import Wired

SOURCE = Path(__file__).with_name("racers.c")


class CRing(ctypes.Structure):
    """`struct ring`"""

    _fields_ = (
        ("desc", ctypes.c_uint64),
        ("avail", ctypes.c_uint64),
        ("used", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("notify", ctypes.c_int32),
        ("odds", ctypes.c_uint32),
    )


class CPlace(ctypes.Structure):
    """`struct place`"""

    _fields_ = (
        ("at", ctypes.c_uint64),
        ("width", ctypes.c_uint32),
        ("values", ctypes.c_uint32),
        ("value", ctypes.c_char_p),
        ("odds", ctypes.c_uint32),
    )


class CMutator(ctypes.Structure):
    """`struct mutator`"""

    _fields_ = (
        ("place", ctypes.POINTER(CPlace)),
        ("places", ctypes.c_uint64),
        ("writes", ctypes.c_uint64),
    )


class CGuest(ctypes.Structure):
    """`struct guest`"""

    _fields_ = (
        ("ring", CRing),
        ("mutator", CMutator),
        ("heads", ctypes.c_uint32),
        ("offered", ctypes.c_uint64),
        ("completed", ctypes.c_uint64),
        ("doubled", ctypes.c_uint64),
        ("too_long", ctypes.c_uint64),
        ("room", ctypes.c_uint32),
        ("busy", ctypes.c_uint8 * 256),
    )


class CRegion(ctypes.Structure):
    """`struct region`"""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("host", ctypes.c_uint64),
    )


class CBack(ctypes.Structure):
    """`struct back`"""

    _fields_ = (
        ("ring", CRing),
        ("mutator", CMutator),
        ("region", CRegion * 8),
        ("regions", ctypes.c_uint32),
        ("lies", ctypes.c_uint32),
        ("taken", ctypes.c_uint64),
        ("malformed", ctypes.c_uint64),
    )


def place(at: int, *values: bytes, noise: int = 0, odds: int = 1) -> CPlace:
    """Memory to change at our address `at`: to one of `values` and back to the first
    of them, or to so many bytes of noise.
    """
    if noise:
        return CPlace(at, noise, 0, None, odds)
    return CPlace(at, len(values[0]), len(values), b"".join(values), odds)


def mutator(places: Sequence[CPlace]) -> CMutator:
    return CMutator((CPlace * len(places))(*places), len(places))


def guest_of(
    lane: Wired,
    heads: int,
    *,
    room: int = 0xFFFFFFFF,
    odds: int = 0,
    places: Sequence[CPlace] = (),
) -> CGuest:
    """A driver that offers the chains 0 to `heads` - 1 of this lane, with room for so
    many bytes each, and rewrites `places`.
    """
    ring = CRing(*lane.guest_parts, lane.size, lane.kick_in, odds)
    return CGuest(ring=ring, mutator=mutator(places), heads=heads, room=room)


def back_of(
    lane: Wired, *, odds: int = 0, lies: int = 0, places: Sequence[CPlace] = ()
) -> CBack:
    """A device for this lane, which rewrites `places`."""
    host = lane.world.isolated.host(lane.area_at)
    parts = [host + at - lane.area_at for at in lane.shadow_parts]
    pieces = lane.world.isolated.pieces.items()
    regions = [CRegion(start, piece.size, piece.address) for start, piece in pieces]
    return CBack(
        ring=CRing(*parts, lane.size, lane.call_in, odds),
        mutator=mutator(places),
        region=(CRegion * 8)(*regions),
        regions=len(regions),
        lies=lies,
    )


class Racers:
    """The compiled racers.c, and functions to run it."""

    def __init__(self, folder: Path) -> None:
        library = folder / "racers.so"
        command = ["cc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC"]
        # The library that tools/test-asan preloads is for Python.
        clean = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        subprocess.run([*command, SOURCE, "-o", library], check=True, env=clean)
        self._library = ctypes.CDLL(str(library))
        self._seed = random.Random(1)

    @contextlib.contextmanager
    def racing(self, *sides: CGuest | CBack) -> Iterator[None]:
        """They run in this context."""
        stop = ctypes.c_int(0)
        threads = []
        for side in sides:
            run = self._library.run_guest
            if isinstance(side, CBack):
                run = self._library.run_back
            seed = ctypes.c_uint64(self._seed.getrandbits(63) | 1)
            arguments = ctypes.byref(side), seed, ctypes.byref(stop)
            threads.append(threading.Thread(target=run, args=arguments, name="racer"))
            threads[-1].start()
        try:
            yield
        finally:
            stop.value = 1
            for thread in threads:
                thread.join()
