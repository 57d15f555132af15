# SPDX-License-Identifier: Apache-2.0
"""Another back-end takes the place of one, and the guest sees a pause."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.integration.test_device_state import STATE, StatefulBack
from tests.integration.test_recovery import (
    PROTOCOL,
    all_run,
    connected,
    hang_up,
    less_features,
    less_queues,
    lose,
    offer,
    other_config,
    sector,
)
from tests.support.airlock import Airlock
from tests.support.backs import PATIENCE, DiskBack, ScriptedBack, wait_until
from tests.support.sessions import await_reaped, errors, serve, small_guest
from vhost_airlock.errors import Disconnected, RequestRefused
from vhost_airlock.peers.disk import BlkStatus
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.vhost.backend import Result
from vhost_airlock.vhost.fds import Fd
from vhost_airlock.vhost.message import Answer
from vhost_airlock.vhost.wire import (
    U64,
    DeviceState,
    Payload,
    ProtocolFeature,
    Request,
    StateDirection,
)

R = Request
P = ProtocolFeature
HASTY = {"timeout": 1.0, "drain_timeout": 0.1}
BESIDE = pytest.mark.parametrize("beside", [True, False], ids=["beside", "one by one"])


@contextmanager
def joined(back: ScriptedBack, **options: Any) -> Iterator[tuple[Airlock, BlkGuest]]:
    """As connected(), with time for a machine that is busy."""
    with connected(back, **{"timeout": PATIENCE} | options) as both:
        yield both


def complete(back: ScriptedBack, guest: BlkGuest, count: int) -> None:
    """The back does so many requests of the first queue, and the guest sees it."""
    for _ in range(count):
        back.complete(back.take(), b"c" * 512)
    done = 0
    while done < count:
        done += len(await_reaped(guest.queues[0]))


def assert_goes_on(airlock: Airlock, back: ScriptedBack, guest: BlkGuest) -> None:
    """As if nothing had been."""
    wait_until(lambda: all_run(airlock), "all rings run")
    serve(back, guest)
    serve(back, guest, 1)


@BESIDE
@pytest.mark.parametrize("recorded", [False, True])
def test_each_request_is_done_once(beside: bool, recorded: bool) -> None:
    """The old one ends what it has fetched, and the new one gets all else, in order."""
    old, new = ScriptedBack(), ScriptedBack()
    with joined(old, recorded=recorded, recover=False) as (airlock, guest):
        for _ in range(3):
            ios = offer(guest, 5)
            chains = [old.take() for _ in range(2)]
            swap = airlock.swap(new, beside=beside)
            for chain in chains:
                old.complete(chain, b"b" * 512)
            assert swap.await_result().startswith("swapped")
            chains = [new.take() for _ in range(3)]
            assert [sector(new, chain) for chain in chains] == [2, 3, 4]
            for chain in chains:
                new.complete(chain, b"b" * 512)
            while not all(io.status == BlkStatus.OK for io in ios):
                await_reaped(guest.queues[0])
            assert_goes_on(airlock, new, guest)
            old, new = new, old
        counts = airlock.session.device.counters()["backend"]
        assert (counts["swaps"], counts["losses"]) == (3, 0)
        assert 0 < counts["paused"] < 3 * PATIENCE * 10**9
        assert airlock.counters()["replayed"] == 0


@BESIDE
def test_it_is_told_all_that_the_old_one_knew(beside: bool) -> None:
    old = ScriptedBack(protocol_features=PROTOCOL)
    new = ScriptedBack(protocol_features=PROTOCOL)
    with joined(old) as (airlock, guest):
        guest.front.set_config(32, b"\1\2")
        guest.front.set_status(0xF)
        airlock.swap(new, beside=beside).await_result()
        assert new.features == old.features
        order = [R.SET_OWNER, R.SET_FEATURES, R.SET_CONFIG, R.SET_STATUS]
        order += [R.SET_VRING_KICK, R.SET_VRING_ENABLE]
        assert sorted(order, key=new.requests().index) == order
        assert [seen.payload.value for seen in new.got(R.SET_STATUS)] == [0xB, 0xF]
        assert_goes_on(airlock, new, guest)


def test_one_that_is_there_is_judged_while_the_old_one_serves() -> None:
    """And the old one is not stopped before."""
    old, new = ScriptedBack(), ScriptedBack()
    asked, go_on = threading.Event(), threading.Event()

    def wait(payload: Payload, fds: list[Fd]) -> Result:
        asked.set()
        assert go_on.wait(PATIENCE)
        return new.answer(R.GET_QUEUE_NUM, payload, fds)

    new.instead[R.GET_QUEUE_NUM] = wait
    with joined(old, timeout=PATIENCE) as (airlock, guest):
        guest.front.get_queue_num()
        swap = airlock.swap(new)
        assert asked.wait(PATIENCE)
        serve(old, guest)
        assert R.GET_VRING_BASE not in old.requests()
        go_on.set()
        swap.await_result()
        assert_goes_on(airlock, new, guest)


def test_one_that_needs_the_place_comes_when_the_old_one_has_ended() -> None:
    old, new = ScriptedBack(), ScriptedBack()
    with joined(old) as (airlock, guest):
        alive: list[bool] = []

        def look(payload: Payload, fds: list[Fd]) -> Result:
            alive.append(any(thread.is_alive() for thread in old._threads))
            return new.answer(R.GET_FEATURES, payload, fds)

        new.instead[R.GET_FEATURES] = look
        airlock.swap(new, beside=False).await_result()
        assert alive == [False]
        assert_goes_on(airlock, new, guest)


@BESIDE
def test_old_one_goes_on_if_it_does_not_end_its_requests(
    beside: bool, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = ScriptedBack(), ScriptedBack()
    with joined(old, drain_timeout=0.2) as (airlock, guest):
        ios = offer(guest, 2)
        chains = [old.take() for _ in ios]
        old.complete(chains[1], b"b" * 512)
        reason = airlock.swap(new, beside=beside).await_failure()
        assert reason == "1 requests have not ended in 0.2 s"
        assert errors(caplog)[-1] == f"back-end: not swapped: {reason}"
        old.complete(chains[0], b"b" * 512)
        while not all(io.status == BlkStatus.OK for io in ios):
            await_reaped(guest.queues[0])
        assert_goes_on(airlock, old, guest)
        airlock.swap(new, beside=beside).await_result()
        assert_goes_on(airlock, new, guest)


@BESIDE
@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (less_features, "it has no features 0x1000 any more"),
        (less_queues, "it has 1 queues, and had 4"),
        (other_config, "its configuration space has 0100000000000000 at 0, and had"),
    ],
)
def test_old_one_goes_on_if_the_new_one_is_another_device(
    beside: bool, change: Callable[[ScriptedBack], None], difference: str
) -> None:
    features = ScriptedBack().offered | 1 << 12
    old, new = (
        ScriptedBack(features=features, protocol_features=PROTOCOL) for _ in range(2)
    )
    change(new)
    with joined(old, recover=False) as (airlock, guest):
        offer(guest, 3)
        reason = airlock.swap(new, beside=beside).await_failure()
        assert difference in reason
        assert reason.endswith("; the last back-end was taken again") is not beside
        assert old.connections == (1 if beside else 2)
        complete(old, guest, 3)
        assert_goes_on(airlock, old, guest)
        assert airlock.session.device.counters()["backend"]["swaps"] == 0


@BESIDE
def test_old_one_goes_on_if_the_new_one_can_not_be_reached(beside: bool) -> None:
    old, new = ScriptedBack(), ScriptedBack()
    with joined(old, recover=False) as (airlock, guest):
        swap = airlock.swap(new, beside=beside, refused="back-end: there is none")
        assert swap.await_failure().startswith("back-end: there is none")
        assert_goes_on(airlock, old, guest)


@BESIDE
@pytest.mark.timing
def test_old_one_goes_on_if_the_new_one_does_not_answer(beside: bool) -> None:
    """As one does that serves another front-end just now."""
    old, new = ScriptedBack(), ScriptedBack()
    over = threading.Event()

    def wait(payload: Payload, fds: list[Fd]) -> Result:
        over.wait(PATIENCE)
        raise Disconnected("the test's back ends")

    new.instead[R.GET_FEATURES] = wait
    with joined(old, recover=False, timeout=1.0) as (airlock, guest):
        swap = airlock.swap(new, beside=beside)
        threading.Timer(1.5, over.set).start()
        assert "is it a vhost-user back-end, and free to serve" in swap.await_failure()
        assert_goes_on(airlock, old, guest)


def test_nothing_is_left_to_go_on_with(caplog: pytest.LogCaptureFixture) -> None:
    """The new one is another device, and the old one does not come back."""
    old, new = ScriptedBack(), ScriptedBack(features=1 << 32)
    with Airlock(old) as airlock, small_guest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        serve(old, guest)

        def leave(payload: Payload, fds: list[Fd]) -> Result:
            raise Disconnected("the test's back hangs up")

        old.instead[R.GET_FEATURES] = leave
        reason = airlock.swap(new, beside=False).await_failure()
        airlock.join()
        assert airlock.session.back_lost
        assert reason.startswith("the back-end is lost: back-end: it is not the")
        assert reason.endswith("closed the connection before its first message")
        assert errors(caplog) == [reason.removeprefix("the back-end is lost: ")]


@BESIDE
def test_new_one_that_is_lost_at_once_is_a_loss(beside: bool) -> None:
    """By the policy, another one is looked for, by the new way."""
    old, new = ScriptedBack(), ScriptedBack()
    lost: list[Request] = []

    def leave(payload: Payload, fds: list[Fd]) -> Result:
        if not lost:
            lost.append(R.SET_VRING_KICK)
            raise Disconnected("the test's back hangs up")
        return new.answer(R.SET_VRING_KICK, payload, fds)

    new.instead[R.SET_VRING_KICK] = leave
    with joined(old) as (airlock, guest):
        offer(guest, 3)
        reason = airlock.swap(new, beside=beside).await_failure()
        assert reason.startswith("the back-end is lost: ")
        wait_until(lambda: all_run(airlock), "another one is found")
        complete(new, guest, 3)
        assert_goes_on(airlock, new, guest)
        assert (old.connections, new.connections) == (1, 2)
        counts = airlock.session.device.counters()["backend"]
        assert (counts["swaps"], counts["losses"]) == (0, 1)


def test_losses_after_it_use_the_new_way() -> None:
    old, new = ScriptedBack(), ScriptedBack()
    with joined(old) as (airlock, guest):
        airlock.swap(new).await_result()
        serve(new, guest)
        lose(airlock, new)
        assert_goes_on(airlock, new, guest)
        assert (old.connections, new.connections) == (1, 2)


def test_old_one_is_lost_while_its_requests_end() -> None:
    """A loss like any other; the order has failed."""
    old, new = ScriptedBack(), ScriptedBack()
    with joined(old, drain_timeout=PATIENCE) as (airlock, guest):
        (io,) = offer(guest, 1)
        old.take()
        swap = airlock.swap(new)
        wait_until(lambda: R.SET_OWNER in new.requests(), "the new one is taken")
        hang_up(old)
        assert swap.await_failure().startswith("the back-end is lost")
        wait_until(lambda: all_run(airlock), "another one is found")
        old.complete(old.take(), b"c" * 512)
        await_reaped(guest.queues[0])
        assert io.status == BlkStatus.OK
        assert_goes_on(airlock, old, guest)


def test_lost_back_may_be_at_work_yet() -> None:
    """Its requests are for no other one then."""
    old, new = ScriptedBack(), ScriptedBack()
    with joined(old) as (airlock, guest):
        ios = offer(guest, 2)
        chains = [old.take() for _ in ios]
        old.complete(chains[1], b"b" * 512)
        await_reaped(guest.queues[0])
        lose(airlock, old, away=True)
        reason = airlock.swap(new, working="process 7 has not ended").await_failure()
        assert reason == (
            "the back-end is lost, and may still be at work on its requests, which"
            " another one would get: process 7 has not ended"
        )
        swap = airlock.swap(new)
        airlock.away = False
        assert swap.await_result() == "the back-end is lost; the new one is looked for"
        wait_until(lambda: all_run(airlock), "another one is found")
        complete(new, guest, 1)
        assert_goes_on(airlock, new, guest)


def test_before_the_vmm_has_said_a_word() -> None:
    old, new = ScriptedBack(), ScriptedBack()
    with Airlock(old) as airlock, small_guest() as guest:
        channel = airlock.channel()
        wait_until(lambda: airlock.session._device is not None, "it is there")
        assert "with its first request" in airlock.swap(new).await_result()
        guest.connect(channel)
        guest.start()
        serve(new, guest)
        assert old.connections == 0
        guest.disconnect()
        airlock.join()


@BESIDE
def test_before_any_ring_is_started(beside: bool) -> None:
    old, new = ScriptedBack(), ScriptedBack()
    with Airlock(old) as airlock, small_guest() as guest:
        channel = airlock.channel()
        guest.connect(channel)
        airlock.swap(new, beside=beside).await_result()
        guest.start()
        serve(new, guest)
        guest.disconnect()
        airlock.join()


def test_rings_are_as_they_were() -> None:
    """One is disabled, and later stopped."""
    old, new = ScriptedBack(), ScriptedBack()
    with joined(old) as (airlock, guest):
        guest.front.set_vring_enable(1, False)
        airlock.swap(new).await_result()
        assert not new.vrings[1].enabled
        offer(guest, 1, 1)
        serve(new, guest)
        assert new.ring(1).take() is None
        guest.front.set_vring_enable(1, True)
        new.complete(new.take(1), b"c" * 512, index=1)
        await_reaped(guest.queues[1])
        guest.front.get_vring_base(1)
        airlock.swap(old).await_result()
        serve(old, guest)
        assert old.vrings[1].ring is None


def test_vmm_leaves_meanwhile() -> None:
    old, new = ScriptedBack(), ScriptedBack()
    with Airlock(old, timeout=PATIENCE) as airlock, small_guest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        offer(guest, 1)
        chain = old.take()
        swap = airlock.swap(new)
        wait_until(lambda: R.SET_OWNER in new.requests(), "the new one is taken")
        guest.disconnect()
        old.complete(chain, b"b" * 512)
        swap.await_result()
        airlock.join()
        assert airlock.session.front_lost


def test_message_of_the_vmm_waits_for_its_end() -> None:
    old, new = ScriptedBack(), ScriptedBack(config=bytes(8) + b"new     ")
    with joined(old, timeout=PATIENCE) as (airlock, guest):
        offer(guest, 1)
        chain = old.take()
        swap = airlock.swap(new)
        wait_until(lambda: R.SET_OWNER in new.requests(), "the new one is taken")
        threading.Timer(0.05, old.complete, [chain, b"b" * 512]).start()
        assert guest.front.get_config(8, 8) == b"new     "
        swap.await_result()
        await_reaped(guest.queues[0])
        assert_goes_on(airlock, new, guest)


def test_old_program_may_take_long_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time for the new one to start its rings is another one."""
    old, new = ScriptedBack(), ScriptedBack()
    late, now = 0.0, time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + late)
    with joined(old, recover=False) as (airlock, guest):

        def ended() -> None:
            nonlocal late
            late += 100 * PATIENCE

        swap = airlock.swap(new, ended=ended)
        assert "stood for" in swap.await_result()
        assert_goes_on(airlock, new, guest)


def test_session_is_stopped_meanwhile() -> None:
    old, new = ScriptedBack(), ScriptedBack()
    with Airlock(old, drain_timeout=0.2) as airlock, small_guest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        offer(guest, 1)
        old.take()
        swap = airlock.swap(new)
        airlock.end()
        assert airlock.session.stopped
        assert swap.answers <= 1


def test_old_one_may_write_to_its_memory_for_ever() -> None:
    old, new = ScriptedBack(), ScriptedBack()
    with joined(old) as (airlock, guest):
        serve(old, guest)
        fds = [Fd.dup(fd) for fd in old.memory_fds()]
        airlock.swap(new).await_result()
        (io,) = offer(guest, 1)
        for fd in fds:
            os.pwrite(fd.fileno(), b"\xff" * (1 << 20), 0)
            fd.close()
        complete(new, guest, 1)
        assert io.status == BlkStatus.OK
        assert airlock.counters()["violations"] == 0


def test_many_leave_nothing_behind() -> None:
    backs = [ScriptedBack(), ScriptedBack()]
    with joined(backs[0]) as (airlock, guest):
        fds = None
        for turn in range(50):
            old, new = backs[turn % 2], backs[1 - turn % 2]
            airlock.swap(new, beside=bool(turn % 3)).await_result()
            assert_goes_on(airlock, new, guest)
            old.join()
            for back in backs:
                back.forget_seen()
            count = len(os.listdir("/proc/self/fd"))
            fds = fds or count
            assert count == fds


def await_progress(airlock: Airlock) -> None:
    """Wait until some more requests are done."""
    done = airlock.counters()["completions"]
    wait_until(
        lambda: airlock.counters()["completions"] > done + 5, "requests are done"
    )


def test_verified_load_notices_nothing() -> None:
    """Both are the same disk, in one memory."""
    old = DiskBack(num_queues=2)
    new = DiskBack(num_queues=2)
    new.disk, old_disk = old.disk, new.disk
    with Airlock(old) as airlock, BlkGuest(num_queues=2) as guest:
        guest.connect(airlock.channel())
        guest.start()
        stop = threading.Event()
        failures: list[BaseException] = []

        def load() -> None:
            try:
                buffer = guest.ram.alloc(4096)
                turn = 0
                while not stop.is_set():
                    data = turn.to_bytes(8, "little") * 512
                    guest.ram.view(buffer, 4096)[:] = data
                    guest.write(8 * (turn % 64), [(buffer, 4096)])
                    guest.ram.view(buffer, 4096)[:] = bytes(4096)
                    guest.read(8 * (turn % 64), [(buffer, 4096)])
                    assert guest.ram.view(buffer, 4096) == data
                    turn += 1
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=load)
        thread.start()
        backs = [old, new]
        for turn in range(20):
            airlock.swap(backs[1 - turn % 2], beside=bool(turn % 3)).await_result()
            await_progress(airlock)
        stop.set()
        thread.join()
        assert failures == []
        guest.disconnect()
        airlock.join()
        new.disk = old_disk


# The device's state.


def stateful(**options: bool) -> tuple[StatefulBack, StatefulBack]:
    return StatefulBack(**options), StatefulBack(**options)


@pytest.fixture
def guest() -> BlkGuest:
    return small_guest(also=[P.DEVICE_STATE])


@BESIDE
@pytest.mark.parametrize("own", [False, True], ids=["our pipe", "its own"])
def test_state_is_carried_over(guest: BlkGuest, own: bool, beside: bool) -> None:
    """From stopped rings, to a back that knows of no ring yet, while both are there."""
    old, new = stateful(own=own)
    with Airlock(old, stateful="open files") as airlock, guest:
        guest.connect(airlock.channel())
        guest.start()
        serve(old, guest)
        swap = airlock.swap(new, beside=beside)
        swap.await_result()
        assert new.loaded == STATE
        seen = old.requests()
        after = seen[seen.index(R.GET_VRING_BASE) :]
        assert after.count(R.GET_VRING_BASE) == 2
        assert after[2:] == [R.SET_DEVICE_STATE_FD, R.CHECK_DEVICE_STATE]
        (saved,) = old.got(R.SET_DEVICE_STATE_FD)
        (loaded,) = new.got(R.SET_DEVICE_STATE_FD)
        assert saved.payload == DeviceState(StateDirection.SAVE, 0)
        assert loaded.payload == DeviceState(StateDirection.LOAD, 0)
        order = [R.SET_FEATURES, R.SET_DEVICE_STATE_FD, R.CHECK_DEVICE_STATE]
        order += [R.SET_VRING_NUM, R.SET_VRING_KICK]
        assert sorted(order, key=new.requests().index) == order
        serve(new, guest)
        guest.disconnect()
        airlock.join()


def refuse(payload: Payload, fds: list[Fd]) -> Result:
    raise RequestRefused("the test's back refuses")


@pytest.mark.parametrize("request_", [R.SET_DEVICE_STATE_FD, R.CHECK_DEVICE_STATE])
@pytest.mark.parametrize("which", ["old", "new"])
def test_old_one_goes_on_with_its_state(
    guest: BlkGuest, which: str, request_: Request
) -> None:
    old, new = stateful()
    back = {"old": old, "new": new}[which]
    usual = back.instead.get(request_)
    back.instead[request_] = refuse
    with Airlock(old, stateful="open files") as airlock, guest:
        guest.connect(airlock.channel())
        guest.start()
        serve(old, guest)
        reason = airlock.swap(new).await_failure()
        assert reason.startswith(f"state, at the {which} back-end: {request_.name}: ")
        serve(old, guest)
        serve(old, guest, 1)
        back.instead.pop(request_)
        if usual is not None:
            back.instead[request_] = usual
        new.loaded = b""
        airlock.swap(new).await_result()
        assert new.loaded == STATE
        serve(new, guest)
        guest.disconnect()
        airlock.join()


@pytest.mark.timing
def test_new_one_does_not_take_the_state(guest: BlkGuest) -> None:
    old, new = stateful()
    held: list[Fd] = []

    def hold(state: DeviceState, fds: list[Fd]) -> Answer:
        held.append(fds.pop())
        return Answer(U64(0x100))

    new.instead[R.SET_DEVICE_STATE_FD] = hold
    with Airlock(old, stateful="open files", **HASTY) as airlock, guest:
        guest.connect(airlock.channel())
        guest.start()
        serve(old, guest)
        reason = airlock.swap(new).await_failure()
        assert reason == (
            "state, at the new back-end: the device's state did not come: it was cut"
            " off"
        )
        serve(old, guest)
        guest.disconnect()
        airlock.join()
    for fd in held:
        fd.close()


def test_state_that_can_not_be_carried_over_is_not_lost(
    guest: BlkGuest,
) -> None:
    """The old one, or the new one, or the VMM has no way for that."""
    old, new = ScriptedBack(), StatefulBack()
    with Airlock(old, stateful="open files") as airlock, guest:
        guest.connect(airlock.channel())
        guest.start()
        serve(old, guest)
        assert airlock.swap(new).await_failure() == (
            "the back-end has open files, and the VMM has not agreed with it on a way"
            " to carry them over (DEVICE_STATE)"
        )
        serve(old, guest)
        guest.disconnect()
        airlock.join()


def test_new_one_without_a_way_for_the_state_is_another_device(guest: BlkGuest) -> None:
    old, new = StatefulBack(), ScriptedBack()
    with Airlock(old, stateful="open files") as airlock, guest:
        guest.connect(airlock.channel())
        guest.start()
        serve(old, guest)
        assert "it has no protocol features 0x" in airlock.swap(new).await_failure()
        serve(old, guest)
        guest.disconnect()
        airlock.join()


def test_not_while_the_vmm_carries_the_state_itself(guest: BlkGuest) -> None:
    old, new = stateful()
    with Airlock(old, stateful="open files") as airlock, guest:
        guest.connect(airlock.channel())
        out, into = map(Fd, os.pipe2(os.O_CLOEXEC))
        with out:
            with into:
                guest.front.set_device_state_fd(StateDirection.SAVE, into)
            assert airlock.swap(new).await_failure() == (
                "the VMM is about to save or load the device's state"
            )
            while os.read(out.fileno(), 1 << 16):
                pass
        guest.front.check_device_state()
        guest.disconnect()
        airlock.join()
