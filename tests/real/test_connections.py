# SPDX-License-Identifier: Apache-2.0
"""Connections between QEMU, the airlock and a back-end that end, and come again.

Of QEMU's own tests/qtest/vhost-user-test.c, these are reconnect, connect-fail,
flags-mismatch and multiqueue. The test is both the guest and the back-end; QEMU is
real, and so is the airlock.
"""

import secrets
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from tests.real.airlock import airlock
from tests.real.qtest import QtestMachine, VirtioDevice
from tests.real.serving import hang_up, serving
from tests.support.backs import RecordedBack, ScriptedBack, wait_until
from vhost_airlock.errors import Disconnected
from vhost_airlock.peers.disk import HEADER, SECTOR, BlkType
from vhost_airlock.peers.ring import Chain
from vhost_airlock.peers.server import RING_FEATURES
from vhost_airlock.vhost.wire import U64, Feature, Request

MRG_RXBUF, CTRL_VQ, MQ = 1 << 15, 1 << 17, 1 << 22
NET_HEADER = bytes(12)
RX, TX, CONTROL = 0, 1, 4
"""Queues of a net device with two pairs."""


# Connections of a net device.


class NetBack(ScriptedBack):
    """A net device which the test speaks for: send() and received() packets."""

    def __init__(self, pairs: int = 1, **options: Any) -> None:
        features = RING_FEATURES | MRG_RXBUF | CTRL_VQ | MQ
        super().__init__(features=features, num_queues=pairs, **options)

    def running(self, *indices: int) -> bool:
        return all(
            (vring := self.vrings[index]).ring is not None and vring.enabled
            for index in indices
        )

    def receive(self, index: int = TX) -> bytes:
        """The guest's next packet."""
        chain = self.take(index)
        packet = self.read(chain)
        self.ring(index).complete(chain.head)
        self.publish(index)
        return packet

    def send(self, packet: bytes, index: int = RX) -> None:
        chain = self.take(index)
        self.room(chain)[0][: len(packet)] = packet
        self.ring(index).complete(chain.head, len(packet))
        self.publish(index)


@pytest.fixture
def net(programs, folder, connect) -> Iterator[Callable[..., VirtioDevice]]:
    """net(back): a driver of a net device, started with all pairs of queues."""
    with ExitStack() as stack:

        def start(back: NetBack, *options: str) -> VirtioDevice:
            front, pairs = connect(back, *options), back.num_queues
            device = "virtio-net-pci-non-transitional,netdev=net"
            device += f",mq={'on' if pairs > 1 else 'off'}"
            machine = QtestMachine(
                programs,
                folder / "qemu.log",
                [device],
                (
                    *("-chardev", f"socket,id=front,path={front},reconnect-ms=50"),
                    *("-netdev", f"vhost-user,id=net,chardev=front,queues={pairs}"),
                ),
            )
            driver = VirtioDevice(stack.enter_context(machine))
            driver.negotiate(MRG_RXBUF | CTRL_VQ | MQ | Feature.EVENT_IDX)
            for index in range(2 * pairs + 1):
                driver.add_queue(index)
            driver.start()
            return driver

        yield start


def exchange(driver: VirtioDevice, back: NetBack, rx: int = RX, tx: int = TX) -> None:
    """A packet in each direction."""
    packet = NET_HEADER + secrets.token_bytes(1000)
    driver.send(tx, packet)
    assert back.receive(tx) == packet
    driver.finish(tx)
    answer = driver.send(rx, writable=2048)
    back.send(packet[::-1], rx)
    assert driver.finish(rx) == len(packet)
    assert driver.machine.read(answer, len(packet)) == packet[::-1]


def test_net_back_end_comes_back(net):
    back = NetBack()
    driver = net(back)
    for connections in range(1, 5):
        wait_until(partial(came, back, connections), "QEMU connects")
        wait_until(lambda: back.running(RX, TX), "rings run")
        exchange(driver, back)
        if connections < 4:
            hang_up(back)


def came(back: RecordedBack, connections: int) -> bool:
    return back.connections >= connections


def test_back_end_hangs_up_at_first(net):
    def features(_, fds):
        if back.connections < 3:
            raise Disconnected("as told")
        return U64(back.offered)

    back = NetBack(instead={Request.GET_FEATURES: features})
    driver = net(back)
    wait_until(lambda: back.running(RX, TX), "rings run")
    assert back.connections == 3
    exchange(driver, back)


def test_back_end_comes_back_with_fewer_features(net):
    """QEMU doesn't want it so, and hangs up until it has them all again."""

    def features(_, fds):
        lost = MRG_RXBUF if back.connections == 2 else 0
        return U64(back.offered & ~lost)

    back = NetBack(instead={Request.GET_FEATURES: features})
    driver = net(back)
    wait_until(lambda: back.running(RX, TX), "rings run")
    exchange(driver, back)
    assert back.features & MRG_RXBUF
    hang_up(back)
    wait_until(lambda: back.connections >= 3, "QEMU connects twice")
    wait_until(lambda: back.running(RX, TX), "rings run again")
    assert back.connections == 3
    assert back.features & MRG_RXBUF
    exchange(driver, back)


def test_queues_in_pairs(net):
    """The second pair is set up with the first, and enabled when the driver says so."""
    back = NetBack(pairs=2)
    driver = net(back, "--workers=2")
    wait_until(lambda: back.running(RX, TX), "the first pair runs")
    exchange(driver, back)
    assert not back.running(RX + 2)
    assert not back.running(TX + 2)
    for pairs in (2, 1, 2):
        assert driver.request(CONTROL, struct.pack("<BBH", 4, 0, pairs), 1) == b"\0"
        assert back.running(RX + 2, TX + 2) == (pairs == 2)
        for pair in range(pairs):
            exchange(driver, back, RX + 2 * pair, TX + 2 * pair)


# Requests in flight when a connection ends.


class Requests:
    """The guest's side of a disk, of which the test is the other side too.

    A request is known by its number; it says so and gets it back.
    """

    def __init__(self, machine: QtestMachine, back: ScriptedBack) -> None:
        self.back = back
        self.driver = VirtioDevice(machine)
        self.driver.negotiate(Feature.EVENT_IDX)
        self.driver.add_queue(0)
        self.driver.start()
        self._taken: dict[int, Chain] = {}

    def running(self) -> bool:
        return self.back.vrings[0].ring is not None

    def offer(self, *numbers: int) -> None:
        for number in numbers:
            header = HEADER.pack(BlkType.IN, 0, number)
            self.driver.send(0, header, writable=SECTOR + 1)

    def take(self) -> int:
        """The back-end gets the next request."""
        chain = self.back.take()
        number: int = HEADER.unpack(self.back.read(chain))[2]
        self._taken[number] = chain
        return number

    def complete(self, *numbers: int) -> None:
        """The back-end does these, and the guest sees it."""
        for number in numbers:
            self.back.complete(self._taken.pop(number), bytes([number]) * SECTOR)
        for _ in numbers:
            assert self.driver.finish(0) == SECTOR + 1


@pytest.fixture
def disk(programs, folder) -> Iterator[Callable[..., Requests]]:
    """disk(back, chardev): the guest's requests to a disk at that socket."""
    with ExitStack() as stack:

        def start(back: ScriptedBack, chardev: str) -> Requests:
            machine = QtestMachine(
                programs,
                folder / "qemu.log",
                ["vhost-user-blk-pci-non-transitional,chardev=front"],
                ("-chardev", f"socket,id=front,{chardev}"),
            )
            return Requests(stack.enter_context(machine), back)

        yield start


def test_disk_back_end_comes_back(connect, disk):
    """It gets the chains again that it did not complete, in the same order."""
    back = ScriptedBack()
    requests = disk(back, f"path={connect(back)},reconnect-ms=50")
    for connections in range(1, 4):
        wait_until(partial(came, back, connections), "QEMU connects")
        wait_until(requests.running, "the ring runs")
        requests.offer(1, 2, 3, 4, 5)
        assert [requests.take() for _ in range(4)] == [1, 2, 3, 4]
        requests.complete(1, 2)
        hang_up(back)
        wait_until(partial(came, back, connections + 1), "QEMU connects again")
        wait_until(requests.running, "the ring runs again")
        assert [requests.take() for _ in range(3)] == [3, 4, 5]
        requests.complete(3, 4, 5)


@pytest.mark.parametrize("qemu", ["connects", "listens"])
def test_airlock_is_replaced(folder, disk, qemu):
    """Told to end it waits for requests in flight; killed, they are sent again."""
    back, path, front = ScriptedBack(), folder / "back.sock", folder / "front.sock"
    listens = qemu == "listens"
    chardev = f"path={front}," + ("server=on" if listens else "reconnect-ms=50")
    with serving(back, path), ExitStack() as stack:
        proxy = stack.enter_context(airlock(path, front, dials=listens))
        requests = disk(back, chardev)
        for connections, killed in enumerate((False, True, False), 2):
            wait_until(requests.running, "the ring runs")
            requests.offer(1, 2, 3)
            assert [requests.take() for _ in range(2)] == [1, 2]
            if killed:
                requests.complete(1)
                proxy.kill()
            else:
                proxy.popen.send_signal(signal.SIGTERM)
                assert not proxy.ended(0.1)
                requests.complete(1, 2)
                assert proxy.wait(timeout=10) == 0
            proxy = stack.enter_context(airlock(path, front, dials=listens))
            wait_until(partial(came, back, connections), "a new airlock comes")
            wait_until(requests.running, "the ring runs again")
            rest = [2, 3] if killed else [3]
            assert [requests.take() for _ in rest] == rest
            requests.complete(*rest)


def test_airlock_is_killed_with_requests_done_out_of_order(folder, disk):
    """QEMU keeps the record of requests in flight: no other base could say it."""
    back, path, front = ScriptedBack(), folder / "back.sock", folder / "front.sock"
    with serving(back, path), ExitStack() as stack:
        proxy = stack.enter_context(airlock(path, front))
        requests = disk(back, f"path={front},reconnect-ms=50")
        for connections in range(2, 5):
            wait_until(requests.running, "the ring runs")
            requests.offer(1, 2, 3, 4, 5)
            assert [requests.take() for _ in range(4)] == [1, 2, 3, 4]
            requests.complete(4, 2)
            proxy.kill()
            proxy = stack.enter_context(airlock(path, front))
            wait_until(partial(came, back, connections), "a new airlock comes")
            wait_until(requests.running, "the ring runs again")
            assert [requests.take() for _ in range(3)] == [1, 3, 5]
            requests.complete(5, 1, 3)
