# SPDX-License-Identifier: Apache-2.0
"""DPDK's example back-ends for crypto and block devices, request by request."""

import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.guest.inside.noise import data
from tests.real.airlock import reach
from tests.real.backends import backend
from tests.real.processes import Process
from tests.real.programs import Programs
from tests.support.client import Client
from vhost_airlock.peers.disk import BlkStatus, BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.vhost.wire import CryptoSession, Feature, ProtocolFeature

EXAMPLES = "/usr/share/dpdk/examples"


@contextmanager
def example(
    programs: Programs, name: str, path: Path, *options: str
) -> Iterator[Process]:
    """An example, built and running in the folder of its socket."""
    if not programs.path(f"{EXAMPLES}/{name}").exists():
        pytest.skip(f"there is no {EXAMPLES}/{name} in {programs.root}")
    program = f"{programs.cache}/dpdk-{name}"
    if not programs.path(program).exists():
        build = (
            f"mkdir -p {programs.cache} && cc -O2 -DALLOW_EXPERIMENTAL_API -o {program}"
            f" {EXAMPLES}/{name}/*.c $(pkg-config --cflags --libs libdpdk)"
        )
        subprocess.run(programs("sh", "-c", build), check=True, timeout=60)
    cpus = ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)))
    argv = programs(
        *("sh", "-c", 'cd "$0" && exec "$@"', str(path.parent), program),
        *("--no-huge", "--in-memory", "-m", "256", "--no-pci", "--no-telemetry"),
        *("--lcores", f"(0,1)@({cpus})", *options),
    )
    with backend(argv, path) as process:
        yield process
        assert not process.ended(), process.describe()


# NIST SP 800-38A, F.2.1: CBC-AES128, the first two blocks.
KEY = bytes.fromhex("2b7e1516 28aed2a6 abf71588 09cf4f3c")
IV = bytes(range(16))
PLAIN = bytes.fromhex(
    "6bc1bee2 2e409f96 e93d7e11 7393172a ae2d8a57 1e03ac9c 9eb76fac 45af8e51"
)
CIPHER = bytes.fromhex(
    "7649abac 8119b246 cee98e9b 12e9197d 5086cb9b 507219ee 95db113a 917678b2"
)
CREATE_CIPHER = 2
AES_CBC = 3
SESSION = struct.Struct("=I4x6I4B4xQQ64s512s432xq")
REQUEST = struct.Struct("=IIQ8x4I24xI20x")


def session(direction: int) -> CryptoSession:
    """A session for AES, as QEMU asks for it."""
    sizes = (AES_CBC, len(KEY), 0, 0, 0, 0)
    kind = (1, direction, 0, 0)
    packed = SESSION.pack(CREATE_CIPHER, *sizes, *kind, 0, 0, KEY, b"", 0)
    return CryptoSession(packed)


def test_crypto(programs, folder, via):
    """The example writes what its used length does not say: only --copy=full is right.

    It takes indirect descriptors only.
    """
    path = folder / "crypto.sock"
    options = ("--vdev=crypto_openssl", "--", "--config=(1,0,0)")
    protocol = ProtocolFeature.CRYPTO_SESSION
    with (
        example(programs, "vhost_crypto", path, *options, f"--socket-file=1,{path}"),
        reach(via, path, "--device-type=crypto") as front,
        Client(front, 1, features=Feature.INDIRECT_DESC, protocol=protocol) as client,
    ):
        client.start()
        sizes = (len(IV), len(PLAIN), len(PLAIN), 0)
        for operation, text, expected in ((0, PLAIN, CIPHER), (1, CIPHER, PLAIN)):
            created = client.front.create_crypto_session(session(operation + 1))
            number = SESSION.unpack(created.data)[-1]
            assert number == operation + 1
            request = REQUEST.pack(operation, AES_CBC, number, *sizes, 1)
            _, written = client.request(0, [request, IV, text], [len(text), 1])
            assert written == [expected, b"\0"]
            client.front.close_crypto_session(number)
        client.stop()


def test_disk(programs, folder, via, same_as_direct):
    path = folder / "vhost.socket"  # its name is fixed
    content = data(1, 1 << 18)
    with (
        example(programs, "vhost_blk", path),
        reach(via, path, "--device-type=block") as front,
        BlkGuest() as guest,
    ):
        guest.connect(str(front))
        guest.start()
        out, into = (guest.ram.alloc(len(content)) for _ in range(2))
        guest.ram.view(out, len(content))[:] = content
        half = len(content) // 2
        guest.write(64, [(out, half), (out + half, half)])
        guest.read(64, [(into, 4096), (into + 4096, len(content) - 4096)])
        assert guest.ram.view(into, len(content)) == content

        ends = {}
        for kind in BlkType:
            io = guest.do(kind, 0, [] if kind == BlkType.FLUSH else [(into, 512)])
            ends[kind.name] = io.status
        assert ends["IN"] == ends["OUT"] == BlkStatus.OK
        same_as_direct(ends)
        guest.stop()
