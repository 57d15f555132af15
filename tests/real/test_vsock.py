# SPDX-License-Identifier: Apache-2.0
"""A guest's vsock: vhost-device-vsock, direct and through the airlock."""

import socket
from contextlib import contextmanager
from pathlib import Path

from tests.guest import devices
from tests.guest.inside import streams
from tests.guest.inside.files import in_threads
from tests.guest.machine import Guest
from tests.real.airlock import reach
from tests.real.backends import vhost_device_vsock

MIB = 1 << 20
HOST, GUEST = 2, 3
TO_HOST, TO_GUEST = 5000, 5001


@contextmanager
def call_guest(host: Path):
    """A connection to the guest, as vhost-device-vsock makes them."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(streams.PATIENCE)
        sock.connect(str(host))
        sock.sendall(b"CONNECT %d\n" % TO_GUEST)
        said = b""
        while not said.endswith(b"\n"):
            said += sock.recv(1)
        assert said.startswith(b"OK ")
        yield sock


def test_streams_in_both_directions(programs, folder, via):
    """Both sides call the other, with 100 MiB sent and with many connections."""
    host = folder / "host"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{host}_{TO_HOST}")
    server = streams.Server(listener)
    cid = f"--guest-cid={GUEST}"
    with (
        vhost_device_vsock(programs, folder / "vsock.sock", host, cid),
        reach(via, folder / "vsock.sock") as front,
        Guest(programs, folder, devices.vsock(front)) as guest,
    ):
        to_host = ["vsock", HOST, TO_HOST]
        guest.call(streams.give_to, to_host, 1, 100 * MIB)
        guest.call(streams.take_from, to_host, 2, 16 * MIB)
        guest.call(streams.connect_many, to_host, 10, 20)

        guest.call(streams.serve, ["vsock", socket.VMADDR_CID_ANY, TO_GUEST])
        with call_guest(host) as sock:
            streams.give(sock, 3, 100 * MIB)
            streams.take(sock, 4, 16 * MIB)

        def one(number: int) -> None:
            for i in range(20):
                with call_guest(host) as sock:
                    streams.both(sock, number * 20 + i)

        in_threads(one, 10)
        assert guest.call(streams.failures) == []
        guest.power_off()
    server.close()
    assert server.failures == []
