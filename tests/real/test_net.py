# SPDX-License-Identifier: Apache-2.0
"""A guest's network: passt, direct and through the airlock."""

import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import pytest

from tests.guest import devices
from tests.guest.booted import booted
from tests.guest.inside import net as interface
from tests.guest.inside import noise, streams
from tests.guest.machine import Guest
from tests.real.airlock import reach
from tests.real.backends import passt
from tests.real.network import Network
from tests.real.programs import new_folder
from tests.support.profiles import STRESS

MIB = 1 << 20
HERE = "127.0.0.1"
SO_RCVBUFFORCE = 33
TO_HOST, TO_GUEST = 5000, 5001
WAYS: dict[str, tuple[str, ...]] = {"direct": (), "airlock": ("--device-type=net",)}
if STRESS:
    WAYS["full"] = ("--copy=full",)


@dataclass(frozen=True)
class Net:
    """A guest, and a server at the other end of its network interface."""

    guest: Guest
    network: Network
    server: streams.Server
    router: str
    pauses: bool
    """passt ends when a packet comes between SET_VRING_KICK and SET_VRING_CALL, which
    QEMU sends in this order. The airlock does not, and so only there QEMU may stop."""

    @property
    def to_host(self) -> streams.Address:
        return ["inet", self.router, TO_HOST]

    def pause(self) -> None:
        """QEMU stops, and with it the rings with all that is posted; and goes on."""
        if self.pauses:
            self.guest.qmp("stop")
            self.guest.qmp("cont")


@pytest.fixture(scope="module", params=WAYS)
def net(request, programs) -> Iterator[Net]:
    """One guest for each way."""
    via = "direct" if request.param == "direct" else "airlock"
    with (
        new_folder() as folder,
        closing(Network(programs, folder)) as network,
        passt(programs, network, folder / "net.sock", f"--tcp-ports={TO_GUEST}"),
        reach(via, folder / "net.sock", *WAYS[request.param]) as front,
        booted(programs, folder, devices.net(front)) as guest,
    ):
        with network.entered():
            server = streams.Server(socket.create_server((HERE, TO_HOST)))
        _, router, mtu = guest.call(interface.configure)
        assert mtu == "65520"
        yield Net(guest, network, server, router, pauses=via == "airlock")
        server.close()
        assert server.failures == []
        counters = guest.call(interface.counters)
        assert [name for name in counters if "error" in name and counters[name]] == []
        guest.power_off()


def test_traffic_of_all_kinds(net):
    """Pings, many connections and 128 MiB each way, with a large and a small MTU."""
    for size in (56, 1472, 9000):
        said = net.guest.sh(f"ping -c 5 -i 0.1 -s {size} {net.router}")
        assert "5 packets received" in said

    net.guest.call(streams.give_to, net.to_host, 1, 128 * MIB)
    net.guest.call(streams.take_from, net.to_host, 2, 128 * MIB)
    net.guest.sh("ip link set eth0 mtu 1500")
    net.guest.call(streams.give_to, net.to_host, 3, 16 * MIB)
    net.guest.call(streams.take_from, net.to_host, 4, 16 * MIB)
    net.guest.call(streams.connect_many, net.to_host, 20, 10)
    net.guest.sh("ip link set eth0 mtu 65520")

    net.guest.call(streams.serve, ["inet", "0.0.0.0", TO_GUEST])
    with net.network.entered():
        to_guest = ["inet", HERE, TO_GUEST]
        streams.give_to(to_guest, 5, 16 * MIB)
        streams.take_from(to_guest, 6, 16 * MIB)
        streams.connect_many(to_guest, 1, 50)
    assert net.guest.call(streams.failures) == []


@pytest.mark.parametrize("function", [streams.give_to, streams.take_from])
def test_pauses_during_a_transfer(net, function):
    """At ten points."""
    size = 128 * MIB
    transfer = net.guest.begin(function, net.to_host, 1, size)
    start = net.server.moved
    for part in range(10):
        due = start + size * part // 10
        net.guest.wait_until(partial(net.server.has_moved, due))
        net.pause()
    transfer.result()


def test_pauses_lose_no_datagram(net):
    """Here nobody would send again what was lost, or notice what came twice."""
    count, size = 3000, 1200
    with net.network.entered(), socket.socket(type=socket.SOCK_DGRAM) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 * MIB)
        receiver.bind((HERE, TO_HOST))
        receiver.settimeout(30)
        call = net.guest.begin(streams.send_datagrams, net.to_host, count, size)
        content = noise.data(0, size - 8)
        for number in range(count):
            if number % (count // 10) == 0:
                net.pause()
            assert receiver.recv(65536) == number.to_bytes(8, "little") + content
        call.result()
