# SPDX-License-Identifier: Apache-2.0
"""The traces of real front-ends on real back-ends, direct and through the airlock.

The back-ends are of three libraries: libvhost-user (qemu-storage-daemon), rust-vmm
(virtiofsd), and DPDK (testpmd). A trace that works direct works through the airlock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.real.airlock import reach
from tests.real.backends import virtiofsd
from tests.real.processes import Process
from tests.real.programs import Programs, new_folder
from tests.real.storage import Disk, storage_daemon
from tests.real.testpmd import Testpmd, vhost
from tests.traces.guests import BlkGuest, FsGuest, Guest, NetGuest
from tests.traces.player import Player
from tests.traces.vmms import VMMS, Vmm
from vhost_airlock.vhost.channel import Channel

CONTENT = b"of the file which guests look up"


AFTER_A_LOSS = "knows no base but the one that it is told"
DIRECT_FAILS = {
    ("blk", "crosvm-2025"): "libvhost-user gives up without VERSION_1",
    ("blk", "alioth"): "libvhost-user looks at a ring with its KICK, before its BASE",
    ("blk", "Dragonball"): f"libvhost-user {AFTER_A_LOSS}",
    ("blk", "virtio-user"): f"libvhost-user {AFTER_A_LOSS}",
    ("fs", "libkrun"): "rust-vmm refuses a second SET_OWNER",
    ("fs", "Dragonball"): f"rust-vmm {AFTER_A_LOSS}",
    ("fs", "virtio-user"): "rust-vmm refuses ENABLE before the features",
    ("net", "alioth"): "DPDK offers no CONFIGURE_MEM_SLOTS",
}
"""Traces that fail without an airlock. With one they work, so all are tried."""


@contextmanager
def blk(programs: Programs, folder: Path) -> Iterator[tuple[Process, Path]]:
    image = folder / "disk.img"
    image.write_bytes(bytes(1 << 20))
    disk = Disk(image, queues=BlkGuest.all)
    with storage_daemon(programs, disk, folder / "blk.sock") as served:
        yield served


@contextmanager
def fs(programs: Programs, folder: Path) -> Iterator[tuple[Process, Path]]:
    share = folder / "share"
    share.mkdir(exist_ok=True)
    share.joinpath("file").write_bytes(CONTENT)
    with virtiofsd(programs, share, folder / "fs.sock") as process:
        yield process, folder / "fs.sock"


@contextmanager
def net(programs: Programs, folder: Path) -> Iterator[tuple[Process, Path]]:
    path = folder / "net.sock"
    with Testpmd(programs, folder / "net.log", [vhost(path)]) as process:
        process("start")
        yield process, path
        process.quit()


BACKENDS = {"blk": blk, "fs": fs, "net": net}
SMALL = ("--pool-limit=16M", "--request-limit=1M")
"""testpmd locks all memory that it is told of, and so touches it with each start."""
TYPES = {"blk": "block", "fs": "fs", "net": "net"}
GUESTS: dict[str, Callable[[], Guest]] = {
    "blk": BlkGuest,
    "fs": lambda: FsGuest(len(CONTENT)),
    "net": NetGuest,
}


class Server:
    """A back-end, and maybe an airlock, that serve one front-end after the other."""

    def __init__(self, programs: Programs, folder: Path, kind: str, via: str) -> None:
        self.programs = programs
        self.folder = folder
        self.kind = kind
        self.via = via
        self._airlock = ExitStack()
        self._back = ExitStack()
        self._process: Process | None = None
        self._front: Path | None = None

    def dial(self) -> Channel:
        """Return a connection. A back-end that ended with the last one starts anew."""
        if self._process is not None and self.kind == "fs":
            self._process.wait(10)
        if self._process is None or self._process.ended():
            self._start()
        assert self._front is not None
        return Channel.connect(str(self._front))

    def _start(self) -> None:
        self._back.close()
        backend = BACKENDS[self.kind](self.programs, self.folder)
        self._process, path = self._back.enter_context(backend)
        if self._front is None:
            type = f"--device-type={TYPES[self.kind]}"
            way = reach(self.via, path, type, *SMALL)
            self._front = self._airlock.enter_context(way)

    def forget(self) -> None:
        """After a failure: the next one gets another back-end."""
        if self._process is not None:
            self._process.kill()
            self._process = None
        with suppress(Exception):
            self._back.close()
        self._back = ExitStack()
        self.folder.joinpath(f"{self.kind}.sock").unlink(missing_ok=True)

    def close(self) -> None:
        self._airlock.close()
        self._back.close()


@pytest.fixture(scope="module", params=["direct", "airlock"])
def via(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=list(BACKENDS))
def server(
    request: pytest.FixtureRequest, programs: Programs, via: str
) -> Iterator[Server]:
    with new_folder() as folder:
        server = Server(programs, folder, str(request.param), via)
        yield server
        server.close()


@pytest.mark.parametrize("vmm", VMMS, ids=lambda vmm: vmm.name)
def test_whole_life(server: Server, vmm: Vmm, request: pytest.FixtureRequest) -> None:
    """From the connection to its end, with requests wherever the rings run."""
    if server.kind not in vmm.kinds:
        pytest.skip(f"{vmm.name} drives no such device")
    reason = DIRECT_FAILS.get((server.kind, vmm.name))
    if server.via == "direct" and reason is not None:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    try:
        with GUESTS[server.kind]() as guest, Player(vmm, guest, server.dial) as player:
            player.play()
    except BaseException:
        server.forget()
        raise
