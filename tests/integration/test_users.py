# SPDX-License-Identifier: Apache-2.0
"""Airlock, VMM and back-end as users of their own, or as one user."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.backs import ScriptedBack
from tests.support.program import Program
from tests.support.sessions import serve, small_guest
from tests.support.users import as_user, python
from vhost_airlock.errors import Disconnected
from vhost_airlock.peers.guest import BlkGuest

BLK = ("-m", "vhost_airlock.peers.blk", "--fd={fd}")
RUN = ("-m", "vhost_airlock", "run")
BACK = 4242
STRICT = "--require-other-user"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    return path


def read(guest: BlkGuest, program: Program, front: Path) -> None:
    guest.connect(program.connect(front))
    guest.start()
    guest.read(0, [(guest.ram.alloc(512), 512)])
    guest.stop()


def test_one_user_is_warned_of_once(
    front: Path, back: ScriptedBack, where: Path
) -> None:
    with Program(f"--socket-path={front}", f"--backend={where}") as program:
        for _ in range(2):
            with small_guest() as guest:
                guest.connect(program.connect(front))
                guest.start()
                serve(back, guest)
        assert program.stop() == 0
        (line,) = program.everything().splitlines()
    user = "as root" if os.geteuid() == 0 else f"as the VMM's user ({os.geteuid()})"
    assert f"back-end: isolated in vain, since it runs {user}, and can open the" in line
    assert line.endswith("; run it as another user")


def test_one_user_can_be_refused(front: Path, where: Path) -> None:
    """The VMM's connection is closed, and so is the next."""
    with Program(f"--socket-path={front}", f"--backend={where}", STRICT) as program:
        for _ in range(2):
            with small_guest() as guest, pytest.raises(Disconnected):
                guest.connect(program.connect(front))
        assert program.stop() == 0
        told = program.everything().splitlines()
    assert len(told) == 2
    assert all("back-end: refused, since it runs as " in line for line in told)


def test_program_that_becomes_another_user_will_do(front: Path, image: Path) -> None:
    command = [*as_user(BACK), *python(), *BLK, f"--blk-file={image}", "--read-only"]
    image.chmod(0o644)
    image.parent.chmod(0o755)
    with Program(f"--socket-path={front}", STRICT, "--", *command) as program:
        with BlkGuest() as guest:
            read(guest, program, front)
        assert program.stop() == 0
        assert program.everything() == ""


def test_program_of_the_airlocks_user_is_refused(front: Path, image: Path) -> None:
    """The airlock is no root, and the program has the user that it was started as."""
    front.parent.chmod(0o777)
    image.chmod(0o644)
    start = [*as_user(BACK), *python(), *RUN]
    command = [*python(), *BLK, f"--blk-file={image}", "--read-only"]
    with Program(
        f"--socket-path={front}", STRICT, "--", *command, command=start
    ) as program:
        with small_guest() as guest, pytest.raises(Disconnected):
            guest.connect(program.connect(front))
        assert program.stop() == 0
        assert f"it runs as the airlock's user ({BACK}), and" in program.everything()


def test_group_of_another_user_can_connect(
    front: Path, back: ScriptedBack, where: Path
) -> None:
    """The airlock's user is a member of a group in which the VMM's user is, too."""
    group = 5353
    front.parent.chmod(0o777)
    where.chmod(0o666)
    start = [*as_user(BACK, group), *python(), *RUN]
    with Program(
        f"--socket-path={front}",
        f"--backend={where}",
        f"--socket-group={group}",
        command=start,
    ) as program:
        with small_guest() as guest:
            guest.connect(program.connect(front))
            guest.start()
            serve(back, guest)
        found = front.stat()
        assert (found.st_uid, found.st_gid) == (BACK, group)
        assert found.st_mode & 0o777 == 0o660
        assert program.stop() == 0
        assert not front.exists()
