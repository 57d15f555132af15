# SPDX-License-Identifier: Apache-2.0
"""A guest's shared file system: virtiofsd, direct and through the airlock."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.guest import devices
from tests.guest.booted import booted
from tests.guest.inside import files
from tests.guest.machine import Guest
from tests.real.airlock import airlock, reach
from tests.real.backends import virtiofsd, virtiofsd_command
from tests.real.processes import listening
from tests.real.programs import Programs, new_folder
from tests.support.profiles import STRESS

MIB = 1 << 20
BIG = 1024 * MIB if STRESS else 192 * MIB
"""The size of a large file."""


@pytest.fixture
def reference(folder) -> dict[str, list[str | int]]:
    """The files after the same steps in a folder without any device."""
    plain = folder / "plain"
    plain.mkdir()
    files.build(str(plain))
    return files.survey(str(plain))


def new_share(folder: Path, name: str) -> Path:
    """A folder to share, with a tree in it that the host has made."""
    share = folder / name
    for part in ("host", "guest", "crowd"):
        share.joinpath(part).mkdir(parents=True)
    files.build(str(share / "host"))
    return share


def check_crowd(share: Path, threads: int) -> None:
    names = {path.name for path in share.joinpath("crowd").iterdir()}
    assert len(names) == threads
    for name in names:
        number = int(name.partition(".")[0])
        found = share.joinpath("crowd", name).read_bytes()
        assert found == files.crowd_content(number)


MODES = {
    "auto": ("--writeback",),
    "always": (),
    "metadata": ("--allow-mmap",),
    "never": ("--allow-mmap", "--allow-direct-io"),
}
MODES_OF = {"airlock": list(MODES), "direct": ["auto", "never"]}
"""Direct, these two differ most."""


@dataclass
class Scene:
    """A guest with a file system named share, and one for each of `modes`."""

    guest: Guest
    folder: Path
    modes: list[str]


@pytest.fixture(scope="module", params=["direct", "airlock"])
def scene(request: pytest.FixtureRequest, programs: Programs) -> Iterator[Scene]:
    modes = MODES_OF[request.param]
    options: dict[str, tuple[str, ...]] = {"share": ("--thread-pool-size=16",)}
    options |= {mode: (f"--cache={mode}", *MODES[mode]) for mode in modes}
    with new_folder() as folder, ExitStack() as stack:
        fronts = []
        for name, words in options.items():
            path = folder / f"{name}.sock"
            share = new_share(folder, name)
            stack.enter_context(virtiofsd(programs, share, path, *words))
            front = stack.enter_context(reach(request.param, path))
            fronts.append(devices.file_system(front, name))
        guest = stack.enter_context(booted(programs, folder, *fronts))
        yield Scene(guest, folder, modes)
        guest.power_off()


def test_guest_and_host_see_the_same(scene, reference):
    """A tree in both directions, a large file, and 200 threads at once."""
    guest, share = scene.guest, scene.folder / "share"
    guest.sh("mount -t virtiofs share /mnt")
    assert guest.call(files.survey, "/mnt/host") == reference
    guest.call(files.build, "/mnt/guest")
    assert guest.call(files.survey, "/mnt/guest") == reference
    assert files.survey(str(share / "guest")) == reference

    guest.call(files.crowd, "/mnt/crowd", 200, 2)
    check_crowd(share, 200)
    guest.sh("rm -r /mnt/host /mnt/guest /mnt/crowd")
    assert list(share.iterdir()) == []

    guest.call(files.write_big, "/mnt/big", 1, BIG)
    files.check_big(str(share / "big"), 1, BIG)
    guest.call(files.check_big, "/mnt/big", 1, BIG)
    guest.sh("umount /mnt")


def test_cache_modes(scene, reference):
    """A file system for each mode; one passes O_DIRECT on."""
    guest = scene.guest
    for mode in scene.modes:
        guest.sh(f"mount -t virtiofs {mode} /mnt")
        assert guest.call(files.survey, "/mnt/host") == reference
        guest.call(files.build, "/mnt/guest")
        guest.call(files.map_file, "/mnt/mapped", 1, 4 * MIB)
        guest.call(files.direct, "/mnt/direct", 2, MIB)
        guest.call(files.crowd, "/mnt/crowd", 50, 1)
        guest.sh("umount /mnt")
        share = scene.folder / mode
        assert files.survey(str(share / "guest")) == reference
        assert share.joinpath("mapped").read_bytes() == files.mapped(1, 4 * MIB)
        files.check_big(str(share / "direct"), 2, MIB)
        check_crowd(share, 50)


def use(guest: Guest, share: Path, number: int) -> None:
    """A file goes each way; what the system before this one wrote is there."""
    share.joinpath("from host").write_text(f"{number}")
    guest.sh("mount -t virtiofs share /mnt")
    assert guest.sh("cat '/mnt/from host'") == f"{number}"
    if number:
        guest.call(files.check_big, "/mnt/big", number - 1, MIB)
    guest.call(files.write_big, "/mnt/big", number, MIB)
    files.check_big(str(share / "big"), number, MIB)


def test_guest_reboots(scene):
    """RESET_DEVICE, which comes with a reboot, makes virtiofsd forget its features."""
    share = scene.folder / "share"
    use(scene.guest, share, 0)
    scene.guest.reboot()
    use(scene.guest, share, 1)


def test_kept_back_end_serves_the_next_vmm(programs, folder):
    """virtiofsd would end with its connection; the first VMM is killed."""
    share = new_share(folder, "share")
    with (
        virtiofsd(programs, share, folder / "fs.sock"),
        reach("airlock", folder / "fs.sock", "--keep-backend") as front,
    ):
        for number in range(2):
            with booted(programs, folder, devices.file_system(front, "share")) as guest:
                use(guest, share, number)
                if number:
                    guest.power_off()


def test_next_session_gets_its_own_back_end(programs, folder):
    """The airlock starts virtiofsd, which ends with each VMM: killed, then stopped."""
    share = new_share(folder, "share")
    front = folder / "fs.front"
    command = virtiofsd_command(programs, share, "--fd={listen-fd}")
    with airlock(None, front, "--device-type=fs", command=command) as proxy:
        for number in range(2):
            assert listening(front)
            with booted(programs, folder, devices.file_system(front, "share")) as guest:
                guest.sh("mount -t virtiofs share /mnt")
                guest.sh(f"echo {number} >> /mnt/log && sync")
                if number:
                    guest.power_off()
        assert not proxy.ended()
    assert share.joinpath("log").read_text() == "0\n1\n"
