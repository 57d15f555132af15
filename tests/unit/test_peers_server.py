# SPDX-License-Identifier: Apache-2.0
"""The server of any device, with one that sends back what it gets."""

from __future__ import annotations

import itertools
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from vhost_airlock.errors import PeerRefused, Stopped
from vhost_airlock.peers import Buffer, DriverRing, SplitLayout, SplitRing
from vhost_airlock.peers.ram import MIB, PAGE, GuestRam
from vhost_airlock.peers.server import DeviceServer
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import Fd, eventfd, notify
from vhost_airlock.vhost.frontend import Frontend
from vhost_airlock.vhost.wire import Feature, ProtocolFeature, VringAddr

SIZE = 16
FEATURES = Feature.VERSION_1 | Feature.PROTOCOL_FEATURES


class Echo:
    features = 0
    num_queues = 1

    def config(self) -> bytes:
        return b"echo"

    def serve(
        self, readable: Sequence[memoryview], writable: Sequence[memoryview]
    ) -> int:
        data = b"".join(readable)
        writable[0][: len(data)] = data
        return len(data)


class Rig:
    """A front-end, a ring, and the server in a thread."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.stop = eventfd()
        self.ended_with: BaseException | None = None
        self._server = DeviceServer(
            Channel(theirs, peer="front"), Echo(), stop=self.stop
        )
        self._thread = threading.Thread(target=self._serve, args=[theirs])
        self._thread.start()
        self.front = Frontend(Channel(ours))
        self.ram = GuestRam(MIB, MIB)
        self.kick, self.call = eventfd(), eventfd()
        self.layout = SplitLayout(SIZE, self.ram.alloc(SplitLayout(SIZE).end))
        words = self.ram.view(self.layout.start, SplitLayout(SIZE).end)
        self.words = SplitRing.at(words, SplitLayout(SIZE))
        self.driver = DriverRing(self.words)
        self.data = self.ram.alloc(PAGE)

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            try:
                self._server.run()
            except Stopped as error:
                self.ended_with = error

    def negotiate(self) -> None:
        self.front.get_features()
        self.front.negotiate(
            ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIGURE_MEM_SLOTS
        )
        self.front.set_owner()
        self.front.set_features(FEATURES)
        for region, fd in self.ram.shared():
            self.front.add_mem_region(region, fd)

    def steps(self) -> dict[str, Callable[[], None]]:
        """The messages that set a ring up, in the front-end's order."""
        user = SplitLayout(SIZE, self.ram.user_addr(self.layout.start))
        addr = VringAddr(0, 0, user.desc, user.used, user.avail)
        return {
            "num": lambda: self.front.set_vring_num(0, SIZE),
            "addr": lambda: self.front.set_vring_addr(addr),
            "call": lambda: self.front.set_vring_call(0, self.call),
            "kick": lambda: self.front.set_vring_kick(0, self.kick),
            "enable": lambda: self.front.set_vring_enable(0, True),
        }

    def offer(self, data: bytes) -> None:
        self.ram.view(self.data, len(data))[:] = data
        self.driver.offer(
            [
                Buffer(self.data, len(data)),
                Buffer(self.data + PAGE // 2, PAGE // 2, True),
            ]
        )
        self.driver.publish()

    def answers(self) -> list[bytes]:
        """Wait for a call, and say what came back."""
        poll = select.poll()
        poll.register(self.call, select.POLLIN)
        while True:
            if found := [length for _, length in self.driver.used()]:
                return [
                    bytes(self.ram.view(self.data + PAGE // 2, length))
                    for length in found
                ]
            assert poll.poll(10_000)
            os.eventfd_read(self.call.fileno())

    def close(self) -> None:
        self.front.close()
        self._thread.join(10)
        assert not self._thread.is_alive()
        for fd in (self.stop, self.kick, self.call):
            fd.close()
        self.words.release()
        self.ram.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    rig.negotiate()
    yield rig
    rig.close()


@pytest.mark.parametrize(
    "order",
    list(itertools.permutations(["num", "addr", "call", "kick", "enable"]))[::7],
    ids="-".join,
)
def test_ring_starts_in_whatever_order(rig: Rig, order: Sequence[str]) -> None:
    rig.offer(b"from before")
    steps = rig.steps()
    for name in order:
        steps[name]()
    assert rig.answers() == [b"from before"]
    rig.offer(b"hello")
    notify(rig.kick)
    assert rig.answers() == [b"hello"]


def test_disabled_ring_is_not_served(rig: Rig) -> None:
    steps = rig.steps()
    for name in ("num", "addr", "call", "kick"):
        steps[name]()
    rig.offer(b"hello")
    notify(rig.kick)
    rig.front.barrier()
    rig.front.barrier()  # the kick was seen before this, at the latest
    assert rig.words.used_idx == 0
    steps["enable"]()
    assert rig.answers() == [b"hello"]


def test_stopped_ring_goes_on_with_its_base_and_a_new_kick(rig: Rig) -> None:
    steps = rig.steps()
    for step in steps.values():
        step()
    rig.offer(b"one")
    notify(rig.kick)
    rig.answers()
    assert rig.front.get_vring_base(0) == 1
    rig.offer(b"two")
    notify(rig.kick)
    rig.front.barrier()
    assert rig.words.used_idx == 1
    rig.front.set_vring_base(0, 1)
    steps["call"]()
    steps["kick"]()
    assert rig.answers() == [b"two"]


def test_new_call_eventfd_is_signalled_at_once(rig: Rig) -> None:
    """A call during the change may have gone to the old one."""
    rig.steps()["call"]()
    assert os.eventfd_read(rig.call.fileno()) == 1


def test_only_what_can_be_waited_for_is_a_kick(rig: Rig) -> None:
    with Fd(os.memfd_create("no-eventfd")) as file, pytest.raises(PeerRefused):
        rig.front.set_vring_kick(0, file)
    steps = rig.steps()
    for step in steps.values():
        step()
    rig.offer(b"hello")
    notify(rig.kick)
    assert rig.answers() == [b"hello"]


def test_ring_outside_of_memory_is_refused(rig: Rig) -> None:
    steps = rig.steps()
    steps["num"]()
    steps["kick"]()
    with pytest.raises(PeerRefused):
        rig.front.set_vring_addr(VringAddr(0, 0, PAGE, PAGE, PAGE))


def test_ring_whose_memory_goes_away_stops(rig: Rig) -> None:
    steps = rig.steps()
    for step in steps.values():
        step()
    rig.offer(b"hello")
    notify(rig.kick)
    rig.answers()
    with eventfd() as err:
        rig.front.set_vring_err(0, err)
        for region, _ in rig.ram.shared():
            rig.front.remove_mem_region(region)
        assert os.eventfd_read(err.fileno()) == 1
    assert rig.front.get_vring_base(0) == 1


def test_stop_ends_it(rig: Rig) -> None:
    notify(rig.stop)
    rig._thread.join(10)
    assert isinstance(rig.ended_with, Stopped)
