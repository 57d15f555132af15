# SPDX-License-Identifier: Apache-2.0
"""A back-end is gone, another one comes, and the VMM keeps its connection."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.airlock import Airlock
from tests.support.backs import PATIENCE, ScriptedBack, wait_until
from tests.support.leftovers import held
from tests.support.profiles import STRESS
from tests.support.sessions import (
    LATE,
    await_reaped,
    errors,
    hold,
    serve,
    small_guest,
)
from tests.support.talk import Talked, talking_back, talking_guest
from vhost_airlock.errors import Disconnected, RequestRefused
from vhost_airlock.peers import Chain
from vhost_airlock.peers.disk import BlkStatus, BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.guest_queue import Io
from vhost_airlock.proxy import recovery
from vhost_airlock.proxy.state import State
from vhost_airlock.vhost.backend import Result
from vhost_airlock.vhost.fds import Fd, notify
from vhost_airlock.vhost.frontend import Frontend
from vhost_airlock.vhost.wire import (
    BackendRequest,
    Config,
    Payload,
    ProtocolFeature,
    Request,
)

R = Request
P = ProtocolFeature
TIMEOUT = 1.0
LOSSES = 1000 if STRESS else 50
PROTOCOL = P.MQ | P.REPLY_ACK | P.CONFIG | P.STATUS | P.CONFIGURE_MEM_SLOTS


@contextlib.contextmanager
def connected(
    back: ScriptedBack, *, recorded: bool = False, **options: object
) -> Iterator[tuple[Airlock, BlkGuest]]:
    """A guest whose rings run, by an airlock that looks for another back.

    `recorded`: its VMM has a record of the chains in flight.
    """
    options = {"recover": True, "timeout": TIMEOUT} | options
    also = [P.STATUS, P.INFLIGHT_SHMFD] if recorded else [P.STATUS]
    with Airlock(back, **options) as airlock, small_guest(also=also) as guest:
        guest.connect(airlock.channel())
        guest.start()
        serve(back, guest)
        yield airlock, guest
        guest.disconnect()
        airlock.join()


def lose(airlock: Airlock, back: ScriptedBack, *, away: bool = False) -> None:
    """The back is gone; until `airlock.away` is False again if `away`."""
    before = back.connections
    airlock.away = away
    hang_up(back)
    if away:
        wait_until(lambda: airlock.session.device.back_side.away, "the loss is noticed")
    else:
        wait_until(lambda: back.connections > before, "it is connected again")
        wait_until(lambda: all_run(airlock), "all rings run again")


def hang_up(back: ScriptedBack) -> None:
    assert back.channel is not None
    with socket.socket(fileno=os.dup(back.channel.fileno())) as its:
        its.shutdown(socket.SHUT_RDWR)


def all_run(airlock: Airlock) -> bool:
    rings = airlock.session.device.rings.values()
    return all(ring.state is State.RUNNING for ring in rings)


def offer(guest: BlkGuest, count: int, index: int = 0) -> list[Io]:
    """The guest offers reads of a sector each."""
    queue = guest.queues[index]
    made = [
        queue.submit(BlkType.IN, sector, [(guest.ram.alloc(512), 512)])
        for sector in range(count)
    ]
    queue.kick()
    return made


def start(guest: BlkGuest, index: int) -> None:
    """Start a ring that the guest's VMM has not spoken of."""
    front, queue = guest.front, guest.queues[index]
    queue.set_features(guest.features)
    front.set_vring_num(index, queue.size)
    front.set_vring_base(index, queue.base)
    front.set_vring_addr(queue.vring_addr(guest.ram))
    front.set_vring_call(index, queue.call_fd)
    front.set_vring_kick(index, queue.kick_fd)
    front.set_vring_enable(index, True)
    front.barrier()


def sector(back: ScriptedBack, chain: Chain) -> int:
    return int.from_bytes(back.read(chain)[8:16], "little")


@pytest.mark.parametrize("recorded", [False, True])
def test_the_next_back_gets_the_chains_that_are_not_done(recorded: bool) -> None:
    """The second of three was done: the first one comes from the airlock's slots."""
    back = ScriptedBack()
    with connected(back, recorded=recorded) as (airlock, guest):
        ios = offer(guest, 3)
        chains = [back.take() for _ in ios]
        back.complete(chains[1], b"b" * 512)
        await_reaped(guest.queues[0])
        lose(airlock, back)
        again = [back.take() for _ in range(2)]
        assert [sector(back, chain) for chain in again] == [0, 2]
        for chain in again:
            back.complete(chain, b"c" * 512)
        while not all(io.status == BlkStatus.OK for io in ios):
            await_reaped(guest.queues[0])
        counters = airlock.counters()
        assert (counters["replayed"], counters["completions"]) == (1, 4)
        assert airlock.session.device.counters()["backend"]["losses"] == 1
        serve(back, guest)
        serve(back, guest, 1)


@pytest.mark.parametrize("steps", range(5))
def test_back_may_be_lost_before_any_ring_is_started(steps: int) -> None:
    """The front goes on where it was, whatever it has said so far."""
    back = ScriptedBack()
    with Airlock(back, recover=True) as airlock, small_guest() as guest:
        channel = airlock.channel()
        with Frontend(channel) as front:
            said: list[Callable[[], object]] = [
                front.get_features,
                front.get_protocol_features,
                lambda: front.set_protocol_features(P.MQ | P.REPLY_ACK | P.CONFIG),
                front.get_queue_num,
                lambda: front.get_config(0, 8),
            ]
            for step, say in enumerate(said):
                say()
                if step == steps:
                    lose(airlock, back)
            # A front-end that begins anew on its connection is served too.
            guest.connect(channel)
            guest.start()
            serve(back, guest)
            guest.disconnect()
            airlock.join()


def test_completions_of_its_last_moment_count() -> None:
    """It had published them, and had not called yet. They are not done again."""
    back = ScriptedBack()
    with connected(back, poll_us=0) as (airlock, guest):
        ios = offer(guest, 2)
        chains = [back.take() for _ in ios]
        call, back.vrings[0].call = back.vrings[0].call, None
        back.complete(chains[1], b"b" * 512)
        back.vrings[0].call = call
        lose(airlock, back)
        await_reaped(guest.queues[0])
        assert [io.status for io in ios] == [None, BlkStatus.OK]
        again = back.take()
        assert sector(back, again) == 0
        back.complete(again, b"c" * 512)
        await_reaped(guest.queues[0])
        assert ios[0].status == BlkStatus.OK


def test_it_is_told_all_that_the_last_one_knew() -> None:
    """In the order that every back-end takes."""
    back = ScriptedBack(protocol_features=PROTOCOL)
    with connected(back) as (airlock, guest):
        front = guest.front
        front.set_config(32, b"\1\2")
        front.set_status(0xF)
        features, before = back.features, len(back.seen)
        lose(airlock, back)
        wait_until(lambda: len(back.got(R.SET_STATUS)) == 3, "it is told all")
        assert back.features == features
        seen = back.requests(before)
        order = [R.SET_OWNER, R.SET_FEATURES, R.SET_CONFIG, R.SET_STATUS]
        order += [R.SET_VRING_KICK, R.SET_VRING_ENABLE]
        assert sorted(order, key=seen.index) == order
        status = [seen.payload.value for seen in back.got(R.SET_STATUS)]
        assert status == [0xF, 0xB, 0xF]
        _, written = back.got(R.SET_CONFIG)
        assert written.payload == Config(32, 2, 0, b"\1\2")
        serve(back, guest)


def test_vmm_is_answered_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the record; a ring stops and starts; what nobody knows has to wait."""
    monkeypatch.setattr(recovery, "LONGEST_PAUSE", 0.05)
    back = ScriptedBack(protocol_features=PROTOCOL, config=bytes(range(60)))
    with connected(back, timeout=1.5) as (airlock, guest):
        front = guest.front
        offered = front.get_features()
        status = front.get_status()
        offer(guest, 2)
        back.take()
        lose(airlock, back, away=True)
        assert front.get_features() == offered
        assert front.get_config(0, 8) == bytes(range(8))
        assert front.get_queue_num() == 4
        assert front.get_status() == status
        assert front.get_vring_base(0) == 1  # all that is not done it offers again
        front.set_vring_base(0, 1)
        front.set_vring_enable(1, False)
        front.set_vring_enable(1, True)
        with pytest.raises(Exception, match="GET_CONFIG"):
            front.get_config(20, 8)
        front.set_vring_kick(0, guest.queues[0].kick_fd)
        airlock.away = False
        assert front.get_config(20, 8) == bytes(range(20, 28))
        for _ in range(2):
            back.complete(back.take(), b"c" * 512)
        await_reaped(guest.queues[0])
        serve(back, guest, 1)


def test_a_back_that_comes_at_the_last_moment_is_not_asked() -> None:
    """It could not answer in time, and would be lost again."""
    back = ScriptedBack(protocol_features=PROTOCOL)
    with connected(back, timeout=0.5) as (airlock, guest):
        lose(airlock, back, away=True)
        comes = threading.Timer(0.3, lambda: setattr(airlock, "away", False))
        comes.start()
        with pytest.raises(RequestRefused, match="GET_CONFIG"):
            guest.front.get_config(20, 8)
        comes.join()
        wait_until(lambda: back.connections == 2, "it is connected again")
        wait_until(lambda: all_run(airlock), "all rings run again")
        assert airlock.session.device.counters()["backend"]["losses"] == 1
        serve(back, guest)


@pytest.mark.parametrize("recorded", [False, True])
def test_device_is_reset_meanwhile(recorded: bool) -> None:
    """Nobody waits for the chains of before."""
    back = ScriptedBack()
    with connected(back, recorded=recorded) as (airlock, guest):
        offer(guest, 3)
        chains = [back.take() for _ in range(3)]
        back.complete(chains[1], b"b" * 512)
        await_reaped(guest.queues[0])
        lose(airlock, back, away=True)
        guest.stop()
        for queue in guest.queues:
            queue.reset()
        guest.start()
        airlock.away = False
        wait_until(lambda: all_run(airlock), "all rings run again")
        serve(back, guest)
        assert airlock.counters()["replayed"] == 0


def test_it_is_lost_while_a_ring_stops() -> None:
    """The VMM gets its answer, and the chain that is not done goes to the next one."""
    back = ScriptedBack()
    lost: list[Request] = []

    def leave(payload: Payload, fds: list[Fd]) -> Result:
        if not lost:
            lost.append(R.GET_VRING_BASE)
            raise Disconnected("the test's back hangs up")
        return back.answer(R.GET_VRING_BASE, payload, fds)

    back.instead[R.GET_VRING_BASE] = leave
    with connected(back, drain_timeout=0.1) as (_, guest):
        (io,) = offer(guest, 1)
        back.take()
        assert guest.front.get_vring_base(0) == 1
        guest.front.set_vring_base(0, 1)
        guest.front.set_vring_kick(0, guest.queues[0].kick_fd)
        back.complete(back.take(), b"c" * 512)
        await_reaped(guest.queues[0])
        assert io.status == BlkStatus.OK


class Prey(ScriptedBack):
    """A back-end that a request for one sector kills. Others it takes one by one, and
    ends only when there is no other to take; so it dies with all that it has.
    """

    def __init__(self, deadly: int) -> None:
        super().__init__()
        self.deadly = deadly
        self.deaths: list[int] = []
        """How many requests it had, each time."""

    def live(self) -> bool:
        """Take what there is. False: that was its death."""
        taken = [(i, chain) for i in range(2) for chain in self.take_all(i)]
        if any(sector(self, chain) == self.deadly for _, chain in taken):
            self.deaths.append(len(taken))
            hang_up(self)
            return False
        for index, chain in taken:
            self.complete(chain, b"c" * 512, index=index)
        return True


def prey_on(
    airlock: Airlock, back: Prey, guest: BlkGuest, ios: list[Io], left: int
) -> None:
    """Live and die until all but `left` of these requests are done."""

    def progress() -> bool:
        for queue in guest.queues:
            queue.reap()
        states = {ring.state for ring in airlock.session.device.rings.values()}
        there = back.connections == len(back.deaths) + 1
        if there and states <= {State.RUNNING, State.BROKEN}:
            back.live()
        return sum(io.status is None for io in ios) <= left

    wait_until(progress, "the requests are done")


DEADLY = 5


@pytest.mark.parametrize("recorded", [False, True])
def test_request_that_kills_back_ends_fails(
    recorded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The third back-end is lost over it alone, and the fourth one never gets it."""
    back = Prey(DEADLY)
    options: dict[str, object] = {"has_error": True, "drain_timeout": PATIENCE}
    with connected(back, recorded=recorded, **options) as (airlock, guest):
        ios = offer(guest, 3, index=1) + offer(guest, 8)
        prey_on(airlock, back, guest, ios, 0)
        failed = [io for io in ios if io.status != BlkStatus.OK]
        assert failed == [ios[3 + DEADLY]]
        assert failed[0].status == BlkStatus.IOERR
        assert len(back.deaths) == 3
        assert back.deaths[-1] == 1
        assert airlock.counters()["poisoned"] == 1
        lines = errors(caplog)
        told = [line for line in lines if "one at a time" in line]
        assert len(told) == 2
        (line,) = [line for line in lines if "again with one request" in line]
        assert line.startswith("ring 0: ")
        assert line.endswith(": it fails")
        serve(back, guest)
        ios = offer(guest, 8, index=1)
        chains = [back.take(1) for _ in ios]  # together again
        for chain in chains:
            back.complete(chain, b"c" * 512, index=1)
        await_reaped(guest.queues[1])


def test_request_that_kills_back_ends_ends_its_ring(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The device has no error for it. The other ring goes on."""
    back = Prey(DEADLY)
    with connected(back, drain_timeout=PATIENCE) as (airlock, guest):
        ios = offer(guest, 3, index=1) + offer(guest, 8)
        prey_on(airlock, back, guest, ios, 8 - DEADLY)
        ring = airlock.session.device.rings[0]
        wait_until(lambda: ring.state is State.BROKEN, "ring 0 is broken")
        wait_until(lambda: "ring 0 is broken" in errors(caplog)[-1], "that is logged")
        assert re.fullmatch(
            "ring 0 is broken: the back-end is lost each time that it gets a chain:"
            r" head \d+, 3 losses",
            errors(caplog)[-1],
        )
        assert airlock.counters()["poisoned"] == 0
        serve(back, guest, 1)


def test_requests_that_take_long_go_together_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The back-end was lost for another reason, and is slow."""
    back = ScriptedBack()
    with connected(back, drain_timeout=0.1) as (airlock, guest):
        ios = offer(guest, 3)
        for _ in range(2):
            for _ in range(3):
                back.take()
            lose(airlock, back)
        chains = [back.take()]
        assert sector(back, chains[0]) == 0
        chains += [back.take() for _ in range(2)]
        for chain in chains:
            back.complete(chain, b"c" * 512)
        while not all(io.status == BlkStatus.OK for io in ios):
            await_reaped(guest.queues[0])
        assert "together again" in errors(caplog)[-1]


def test_a_ring_that_is_made_meanwhile_waits() -> None:
    """The VMM first speaks of it while the other one's requests go one at a time."""
    back = ScriptedBack()
    airlock = Airlock(back, recover=True, timeout=TIMEOUT, drain_timeout=PATIENCE)
    with airlock, small_guest(also=[P.STATUS]) as guest:
        guest.connect(airlock.channel())
        queues = guest.queues
        guest.queues = queues[:1]
        guest.start()
        offer(guest, 3)
        for _ in range(2):
            for _ in range(3):
                back.take()
            lose(airlock, back)
        chain = back.take()
        guest.queues = queues
        start(guest, 1)
        offer(guest, 1, index=1)
        for _ in range(2):
            back.complete(chain, b"c" * 512)
            chain = back.take()
            assert list(back.take_all(1)) == []
        back.complete(chain, b"c" * 512)
        back.complete(back.take(1), b"c" * 512, index=1)
        guest.disconnect()
        airlock.join()


def test_request_that_was_not_alone_is_not_to_blame(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its ring has the turn, but the other one's request took longer than that has."""
    back = ScriptedBack()
    with connected(back, has_error=True, drain_timeout=0.1) as (airlock, guest):
        ios = offer(guest, 1) + offer(guest, 1, index=1)
        for _ in range(3):
            back.take()
            back.take(1)
            lose(airlock, back)
        assert not [line for line in errors(caplog) if "again with one" in line]
        for index in range(2):
            back.complete(back.take(index), b"c" * 512, index=index)
            await_reaped(guest.queues[index])
        assert [io.status for io in ios] == [BlkStatus.OK] * 2
        assert airlock.counters()["poisoned"] == 0


def test_old_one_may_write_to_its_memory_for_ever() -> None:
    """Rings and buffers of the next back lie elsewhere. Its eventfds are the same, and
    only wake the airlock.
    """
    back = ScriptedBack()
    with connected(back) as (airlock, guest), contextlib.ExitStack() as stack:
        (io,) = offer(guest, 1)
        back.take()
        old = []
        for fd in back.memory_fds():
            old.append(stack.enter_context(mmap.mmap(fd.fileno(), 0)))
        calls = [Fd.dup(seen.fds[0]) for seen in back.got(R.SET_VRING_CALL)]
        for call in calls:
            stack.callback(call.close)
        enough = threading.Event()

        def write_on() -> None:
            while not enough.is_set():
                for memory in old:
                    memory[: 1 << 20] = os.urandom(1 << 20)
                for call in calls:
                    notify(call)

        lose(airlock, back)
        writer = threading.Thread(target=write_on)
        writer.start()
        stack.callback(writer.join)
        stack.callback(enough.set)
        back.complete(back.take(), b"c" * 512)
        await_reaped(guest.queues[0])
        assert io.status == BlkStatus.OK
        for _ in range(200):
            serve(back, guest)
            serve(back, guest, 1)
        counters = airlock.counters()
        assert (counters["violations"], counters["faults"]) == (0, 0)


def less_features(back: ScriptedBack) -> None:
    back.offered &= ~(1 << 12)


def less_protocol(back: ScriptedBack) -> None:
    back.protocol_offered &= ~int(P.STATUS)


def less_queues(back: ScriptedBack) -> None:
    back.num_queues = 1


def other_config(back: ScriptedBack) -> None:
    back.config = b"\1" + back.config[1:]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (less_features, "it has no features 0x1000 any more"),
        (less_protocol, "it has no protocol features 0x10000 any more"),
        (less_queues, "it has 1 queues, and had 4"),
        (
            other_config,
            "its configuration space has 0100000000000000 at 0,"
            " and had 0000000000000000",
        ),
    ],
)
def test_another_device_does_not_take_its_place(
    change: Callable[[ScriptedBack], None],
    difference: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    features = ScriptedBack().offered | 1 << 12
    back = ScriptedBack(features=features, protocol_features=PROTOCOL)
    with Airlock(back, recover=True) as airlock, small_guest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        serve(back, guest)
        change(back)
        hang_up(back)
        airlock.join()
        assert errors(caplog)[-1] == (
            f"back-end: it is not the device that the VMM knows: {difference}"
        )


def test_a_capacity_may_grow(caplog: pytest.LogCaptureFixture) -> None:
    """The front is told when the requests go on, and reads the new one."""
    back = talking_back()
    back.config = (8).to_bytes(8, "little") + bytes(range(52))
    grown = (1 << 40).to_bytes(8, "little") + bytes(range(52))
    options = {"recover": True, "grows": True}
    with Airlock(back, **options) as airlock, talking_guest() as guest:
        with Talked(airlock, back, guest) as talk:
            front = guest.front
            assert front.get_config(0, 60) == back.config
            (io,) = offer(guest, 1)
            back.take()
            back.config = grown
            lose(airlock, back)
            with talk.heard.recv(time.monotonic() + PATIENCE) as message:
                assert message.request == BackendRequest.CONFIG_CHANGE_MSG
            assert front.get_config(0, 60) == grown
            back.complete(back.take(), b"c" * 512)
            await_reaped(guest.queues[0])
            assert io.status == BlkStatus.OK
            assert errors(caplog)[-1].endswith(
                "its capacity has grown; the VMM is told"
            )
            back.config = (8).to_bytes(8, "little") + bytes(range(52))
            hang_up(back)
            airlock.join()
        assert "its configuration space has 0800000000000000" in errors(caplog)[-1]


@pytest.mark.parametrize(
    ("grows", "config"),
    [
        (False, (9).to_bytes(8, "little") + bytes(52)),
        (True, (7).to_bytes(8, "little") + bytes(52)),
        (True, (9).to_bytes(8, "little") + b"\1" + bytes(51)),
    ],
    ids=["another type", "shrunk", "more than that"],
)
def test_nothing_else_may_change(
    grows: bool, config: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    back = ScriptedBack(config=(8).to_bytes(8, "little") + bytes(52))
    options = {"recover": True, "grows": grows}
    with Airlock(back, **options) as airlock, small_guest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        guest.front.get_config(0, 60)
        back.config = config
        hang_up(back)
        airlock.join()
        assert "it is not the device that the VMM knows" in errors(caplog)[-1]


def test_a_back_that_hangs_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    """The VMM gets no answer that only this back can give, in no more time than ever.
    The next one gets the requests.
    """
    back = ScriptedBack()

    def hang(payload: Payload, fds: list[Fd]) -> Result:
        del back.instead[R.GET_CONFIG]
        hold(back)

    with connected(back, timeout=0.4) as (airlock, guest):
        (io,) = offer(guest, 1)
        back.take()
        back.instead[R.GET_CONFIG] = hang
        with pytest.raises(RequestRefused, match="GET_CONFIG"):
            guest.front.get_config(20, 8)
        airlock.assert_no_message_took_longer(LATE)
        assert any("did not answer in time (GET_CONFIG)" in e for e in errors(caplog))
        wait_until(lambda: back.connections == 2, "it is connected again")
        wait_until(lambda: all_run(airlock), "all rings run again")
        back.complete(back.take(), b"c" * 512)
        await_reaped(guest.queues[0])
        assert io.status == BlkStatus.OK
        assert guest.front.get_config(20, 8) == bytes(8)
        assert airlock.session.device.counters()["backend"]["losses"] == 1


def test_a_ring_stops_though_the_back_hangs() -> None:
    """The front has its base in time, and the requests that are not done with it."""
    back = ScriptedBack()

    def hang(payload: Payload, fds: list[Fd]) -> Result:
        del back.instead[R.GET_VRING_BASE]
        hold(back)

    with connected(back, timeout=0.4, drain_timeout=0.1) as (airlock, guest):
        (io,) = offer(guest, 1)
        back.take()
        back.instead[R.GET_VRING_BASE] = hang
        assert guest.front.get_vring_base(0) == 1
        airlock.assert_no_message_took_longer(LATE)
        guest.front.set_vring_base(0, 1)
        guest.front.set_vring_kick(0, guest.queues[0].kick_fd)
        wait_until(lambda: back.connections == 2, "it is connected again")
        wait_until(lambda: all_run(airlock), "all rings run again")
        back.complete(back.take(), b"c" * 512)
        await_reaped(guest.queues[0])
        assert io.status == BlkStatus.OK


def test_a_back_that_breaks_the_protocol_is_not_replaced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    back = ScriptedBack()
    with Airlock(back, recover=True) as airlock, small_guest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        serve(back, guest)
        assert back.channel is not None
        back.channel.send(R.GET_FEATURES, bytes(8))
        airlock.join()
        assert errors(caplog)[-1] == "back-end: sent bytes to no request"
        assert back.connections == 1


def test_a_back_that_is_lost_again_and_again_is_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    back = ScriptedBack()
    with Airlock(back, recover=True) as airlock, small_guest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        for _ in range(5):
            serve(back, guest)
            lose(airlock, back)
        serve(back, guest)
        hang_up(back)
        airlock.join()
        assert errors(caplog)[-1].endswith("it was lost 6 times in 60 s")
        assert airlock.session.back_lost


def test_a_back_that_does_not_come_is_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    back = ScriptedBack()
    options = {"recover": True, "recover_time": 0.3}
    with Airlock(back, **options) as airlock, small_guest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        lose(airlock, back, away=True)
        airlock.join()
        assert errors(caplog)[-1].endswith("no other back-end came in 0.3 s")
        assert airlock.session.back_lost


def test_the_session_can_be_stopped_meanwhile() -> None:
    back = ScriptedBack()
    with Airlock(back, recover=True) as airlock, small_guest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        lose(airlock, back, away=True)
        airlock.end()
        assert airlock.session.stopped


@pytest.mark.parametrize("recorded", [False, True])
def test_many_losses_leave_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    monkeypatch.setattr(recovery, "PERIOD", 0.0)
    back = ScriptedBack()
    with connected(back, recorded=recorded) as (airlock, guest):
        before = None
        for _ in range(LOSSES):
            (io,) = offer(guest, 1)
            back.take()
            lose(airlock, back)
            back.complete(back.take(), b"c" * 512)
            await_reaped(guest.queues[0])
            assert io.status == BlkStatus.OK
            back.forget_seen()
            before = before or held()
            assert held() == before
