# SPDX-License-Identifier: Apache-2.0
"""Sessions in which the VMM wants to know which pages are written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from tests.support.airlock import Airlock, hung_up
from tests.support.backs import ScriptedBack, readable, wait_until
from tests.support.dirty import PAGE, LogFile
from tests.support.hung import hung
from tests.support.sessions import await_reaped, errors, lose, serve, small_guest
from vhost_airlock.errors import Disconnected, PeerRefused
from vhost_airlock.peers.disk import BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.ram import HIGH, MIB
from vhost_airlock.proxy import ration
from vhost_airlock.proxy.coupling import Coupling
from vhost_airlock.proxy.state import State
from vhost_airlock.proxy.workers import Workers
from vhost_airlock.record import replaced
from vhost_airlock.vhost.fds import Fd, drain, eventfd
from vhost_airlock.vhost.wire import (
    U64,
    Feature,
    HeaderFlag,
    Log,
    Payload,
    ProtocolFeature,
    Request,
    VringFlag,
)

END = HIGH + 192 * MIB
"""Where the guest's memory ends."""
FAR = 8 << 30
"""Memory there has its bits in a page of the log that is not used otherwise."""
SECTOR = 512
ASKING = HeaderFlag.VERSION | HeaderFlag.NEED_REPLY


@pytest.fixture
def back() -> ScriptedBack:
    """It knows nothing of dirty logs."""
    back = ScriptedBack()
    back.offered &= ~int(Feature.LOG_ALL)
    back.protocol_offered &= ~int(ProtocolFeature.LOG_SHMFD)
    return back


@pytest.fixture
def airlock(back: ScriptedBack) -> Iterator[Airlock]:
    with Airlock(back, drain_timeout=0.2) as airlock:
        yield airlock


@pytest.fixture
def guest(airlock: Airlock) -> Iterator[BlkGuest]:
    with small_guest(also=[ProtocolFeature.LOG_SHMFD]) as guest:
        guest.connect(airlock.channel())
        yield guest


@pytest.fixture
def log() -> Iterator[LogFile]:
    with closing(LogFile.up_to(END)) as log:
        yield log
        assert log.intact()


def use(guest: BlkGuest, log: LogFile) -> None:
    guest.front.set_log_base(log.told.size, log.told.offset, log.fd)


def log_all(guest: BlkGuest, on: bool = True) -> None:
    """As VMMs do: the features, and the addresses of each ring."""
    guest.front.set_features(guest.features | (Feature.LOG_ALL if on else 0))
    for queue in guest.queues:
        addr = queue.vring_addr(guest.ram)
        flags = VringFlag.LOG if on else 0
        guest.front.set_vring_addr(replaced(addr, flags=flags))


def begin_read(guest: BlkGuest, index: int = 0) -> int:
    """Ask for a sector; returns the page of the buffer for it."""
    queue = guest.queues[index]
    buffer = guest.ram.alloc(SECTOR)
    queue.submit(BlkType.IN, 0, [(buffer, SECTOR)])
    queue.kick()
    return buffer // PAGE


def end_read(guest: BlkGuest, back: ScriptedBack, index: int = 0) -> None:
    back.complete(back.take(index), b"d" * SECTOR + b"\0", index=index)
    await_reaped(guest.queues[index])


def read(guest: BlkGuest, back: ScriptedBack, index: int = 0) -> int:
    page = begin_read(guest, index)
    end_read(guest, back, index)
    return page


def ring_page(guest: BlkGuest, index: int = 0) -> int:
    """The page of the used ring, which is a small one."""
    return guest.queues[index].ring_addr // PAGE


def status_page(guest: BlkGuest, index: int = 0) -> int:
    """The page of the statuses of all requests."""
    return guest.queues[index]._slots_addr // PAGE


def marked(guest: BlkGuest, log: LogFile) -> set[int]:
    """The pages that are marked beside those of the rings' words: the worker asks for
    kicks whenever it comes to rest.
    """
    return log.take() - {ring_page(guest, queue.index) for queue in guest.queues}


def all_written(guest: BlkGuest, page: int, index: int = 0) -> set[int]:
    """The pages that a request to read writes, beside the ring's."""
    return {page, status_page(guest, index)}


def test_it_is_offered_whatever_the_back_has_and_kept_from_it(guest, back, log):
    assert guest.front.get_features() & Feature.LOG_ALL
    assert guest.front.get_protocol_features() & ProtocolFeature.LOG_SHMFD
    guest.start()
    use(guest, log)
    log_all(guest)
    serve(back, guest)
    for seen in back.got(Request.SET_FEATURES):
        assert not seen.payload.value & Feature.LOG_ALL
    for seen in back.got(Request.SET_PROTOCOL_FEATURES):
        assert not seen.payload.value & ProtocolFeature.LOG_SHMFD
    for seen in back.got(Request.SET_VRING_ADDR):
        assert (seen.payload.flags, seen.payload.log) == (0, 0)
    assert not back.got(Request.SET_LOG_BASE)


def test_a_back_that_has_it_is_not_told_either(airlock, back, log):
    back.offered |= int(Feature.LOG_ALL)
    back.protocol_offered |= int(ProtocolFeature.LOG_SHMFD)
    with small_guest(also=[ProtocolFeature.LOG_SHMFD]) as guest:
        guest.connect(airlock.channel())
        guest.start()
        use(guest, log)
        log_all(guest)
        serve(back, guest)
    assert not back.features & Feature.LOG_ALL
    assert not back.protocol_features & ProtocolFeature.LOG_SHMFD


def test_the_reply_to_a_log_is_the_message(guest, log):
    """16 bytes: some VMMs wait for so many, and others don't look."""
    channel = guest.front.channel
    channel.send(Request.SET_LOG_BASE, log.told.pack(), [log.fd])
    with channel.recv() as reply:
        assert (reply.request, reply.payload) == (Request.SET_LOG_BASE, log.told.pack())


def test_pages_are_marked_while_rings_run(guest, back, log):
    guest.start()
    use(guest, log)
    log_all(guest)
    log.take()
    for index in 0, 1, 0:
        page = read(guest, back, index)
        assert marked(guest, log) == all_written(guest, page, index)


def test_logging_is_switched_on_and_off_without_a_word_to_the_back(guest, back, log):
    guest.start()
    serve(back, guest)
    before = len(back.seen)
    begin_read(guest)
    chain = back.take(0)  # it is in flight all the time
    for _ in range(3):
        use(guest, log)
        log_all(guest)
        log.take()
        assert read(guest, back, 1) in log.take()
        log_all(guest, False)
        log.take()
        read(guest, back, 1)
        assert log.take() == set()
    assert back.requests(before) == []
    back.complete(chain, b"d" * SECTOR + b"\0")
    await_reaped(guest.queues[0])


def test_other_features_can_not_change_with_it(guest, back, airlock):
    guest.start()
    other = guest.features & ~Feature.EVENT_IDX | Feature.LOG_ALL
    with pytest.raises(PeerRefused):
        guest.front.set_features(other)
    serve(back, guest)


def test_the_flag_of_a_ring_is_for_its_words_alone(guest, back, log):
    guest.start()
    use(guest, log)
    addr = guest.queues[1].vring_addr(guest.ram)
    guest.front.set_vring_addr(replaced(addr, flags=VringFlag.LOG))
    log.take()
    read(guest, back, 0)
    read(guest, back, 1)
    assert log.take() == {ring_page(guest, 1)}
    guest.front.set_vring_addr(addr)
    log.take()
    read(guest, back, 1)
    assert log.take() == set()


def test_log_all_is_for_the_words_too(guest, back, log):
    """Some VMMs may tell the features only, and a page too many does no harm."""
    guest.start()
    use(guest, log)
    guest.front.set_features(guest.features | Feature.LOG_ALL)
    log.take()
    page = read(guest, back)
    assert marked(guest, log) == all_written(guest, page)


@pytest.mark.parametrize("offset", [0, 1, 8, 5000])
def test_a_log_may_begin_anywhere_in_its_file(guest, back, offset):
    guest.start()
    with closing(LogFile.up_to(END, offset)) as log:
        use(guest, log)
        log_all(guest)
        log.take()
        page = read(guest, back)
        assert marked(guest, log) == all_written(guest, page)
        assert log.intact()


def test_the_log_is_another_one_in_each_round(guest, back):
    """As Cloud Hypervisor has it: a log is read when the next one is in use."""
    guest.start()
    expected: set[int] = set()
    old = None
    fds = len(os.listdir("/proc/self/fd"))
    for turn in range(20):
        log = LogFile.up_to(END, turn)
        use(guest, log)
        if turn == 0:
            log_all(guest)
        if old is not None:
            assert expected <= old.take()
            read(guest, back)
            assert old.take() == set()
            old.close()
        page = read(guest, back)
        expected = all_written(guest, page)
        old = log
    assert old is not None
    old.close()
    assert len(os.listdir("/proc/self/fd")) <= fds


def test_each_change_is_made_while_the_workers_stand_still(
    guest, back, log, airlock, monkeypatch
):
    """So no store is under way that is logged as before when the VMM is answered."""
    guest.start()
    pump = airlock.session.device.rings[0].pump
    paused = []
    changes = []
    usual = Workers.pause

    @contextmanager
    def pause(self):
        with usual(self):
            paused.append(True)
            yield
            paused.pop()

    def note(coupling):
        assert paused, f"the workers run, and ring {coupling.index} changes"
        changes.append(coupling.pump is pump)
        set_logging(coupling)

    set_logging = Coupling.set_logging
    monkeypatch.setattr(Workers, "pause", pause)
    monkeypatch.setattr(Coupling, "set_logging", note)
    for act in (
        lambda: use(guest, log),
        lambda: guest.front.set_features(guest.features | Feature.LOG_ALL),
        lambda: guest.front.set_features(guest.features),
    ):
        changes.clear()
        act()
        guest.front.barrier()
        assert any(changes)


CHANGES: dict[str, Callable[[BlkGuest, LogFile], tuple[Payload, list[int]]]] = {
    "SET_LOG_BASE": lambda guest, log: (log.told, [log.fd]),
    "SET_FEATURES": lambda guest, log: (U64(guest.features), []),
    "SET_VRING_ADDR": lambda guest, log: (guest.queues[0].vring_addr(guest.ram), []),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_answered_when_the_store_under_way_is_logged(
    guest, back, airlock, log, change
):
    """The worker waits for a page of the log meanwhile: the old one is not done yet."""
    guest.start()
    region = guest.ram.plug(FAR, 2 * MIB)
    with closing(LogFile.up_to(FAR + (1 << 30))) as old:
        use(guest, old)
        log_all(guest)
        guest.front.add_mem_region(region, dict(guest.ram.shared())[region])
        buffer = guest.ram.alloc(SECTOR, region=region)
        queue = guest.queues[0]
        queue.submit(BlkType.IN, 0, [(buffer, SECTOR)])
        queue.kick()
        chain = back.take(0)
        its_bits = airlock.session.device.dirty_log.place[0] + FAR // PAGE // 8
        channel = guest.front.channel
        with hung(its_bits, PAGE) as waited_for:
            back.complete(chain, b"d" * SECTOR + b"\0")
            assert readable(waited_for)
            payload, fds = CHANGES[change](guest, log)
            channel.send(Request[change], payload.pack(), fds, flags=ASKING)
            assert not readable(channel, 0.2)
        channel.recv().close()
        assert buffer // PAGE in old.take()
        await_reaped(queue)


def test_a_ring_that_starts_while_the_vm_migrates(guest, back, log):
    """QEMU tells features and rings first, and the log last of all."""
    guest.front.set_features(guest.features | Feature.LOG_ALL)
    guest.features |= Feature.LOG_ALL
    guest.start()
    page = read(guest, back)
    use(guest, log)
    assert log.take() == {ring_page(guest, 0), ring_page(guest, 1)}
    page = read(guest, back)
    assert marked(guest, log) == all_written(guest, page)


def test_a_log_that_comes_late_has_what_a_start_wrote(guest, back, log, monkeypatch):
    """QEMU has it so if the VM is stopped while it migrates, and goes on: it lets go of
    the log when it stops the device, and gives another one between kick and enable.

    At the start, a request is done that had not ended by the stop.
    """
    guest.features |= Feature.LOG_ALL
    guest.start()
    use(guest, log)
    slow = begin_read(guest)
    chain = back.take(0)
    read(guest, back)
    guest.stop()
    log.take()
    back.complete(chain, b"d" * SECTOR + b"\0")
    with closing(LogFile.up_to(END, 5)) as new:
        enable = guest.front.set_vring_enable

        def give_log_before(index: int, on: bool) -> None:
            if index == 0:
                use(guest, new)
            enable(index, on)

        monkeypatch.setattr(guest.front, "set_vring_enable", give_log_before)
        guest.start()
        await_reaped(guest.queues[0])
        found = new.take()
        assert all_written(guest, slow) | {ring_page(guest)} <= found
        assert new.intact()


def test_a_log_of_before_is_not_looked_at_again(guest, back, log):
    """Only a start makes it matter: some VMMs read it when the next one is in use."""
    guest.start()
    use(guest, log)
    log_all(guest)
    with closing(LogFile.up_to(END)) as second, closing(LogFile.up_to(END)) as third:
        use(guest, second)
        page = read(guest, back)
        use(guest, third)
        assert page in second.take()
        assert page not in third.take()


def test_memory_that_is_plugged_has_bits_in_the_larger_log(guest, back, log):
    guest.start()
    use(guest, log)
    log_all(guest)
    region = guest.ram.plug(8 << 30, 2 * MIB)
    with closing(LogFile.up_to((8 << 30) + 2 * MIB)) as larger:
        use(guest, larger)
        fd = dict(guest.ram.shared())[region]
        guest.front.add_mem_region(region, fd)
        larger.take()
        queue = guest.queues[0]
        buffer = guest.ram.alloc(SECTOR, region=region)
        queue.submit(BlkType.IN, 0, [(buffer, SECTOR)])
        queue.kick()
        end_read(guest, back)
        assert marked(guest, larger) == all_written(guest, buffer // PAGE)
        assert larger.intact()


def test_a_log_that_is_too_short_is_said_once(
    guest, back, airlock, caplog, monkeypatch
):
    monkeypatch.setattr(ration, "INTERVAL", 1e6)
    guest.start()
    with closing(LogFile(64)) as log:
        use(guest, log)
        log_all(guest)
        for _ in range(3):
            read(guest, back)
        wait_until(lambda: bool(errors(caplog)), "the log is told")
        guest.front.barrier()
        assert log.intact()
    assert airlock.counters()["unlogged"] > 3
    told = [line for line in errors(caplog) if "has no bits for pages" in line]
    assert len(told) == 1


def test_an_eventfd_is_signalled_when_a_page_is_marked(guest, back, log):
    guest.start()
    told = eventfd()
    guest.front.set_log_fd(told)
    use(guest, log)
    log_all(guest)
    read(guest, back)
    assert readable(told)
    drain(told)
    page = begin_read(guest)
    guest.front.barrier()
    drain(told)  # kicks are asked for
    end_read(guest, back)
    assert readable(told)
    assert page in log.take()
    other = eventfd()
    guest.front.set_log_fd(other)
    drain(told)
    read(guest, back)
    assert readable(other)
    assert not drain(told)
    told.close()
    other.close()


class TestEnd:
    def test_after_a_stop_nothing_is_written_or_marked(self, guest, back, log):
        guest.start()
        use(guest, log)
        log_all(guest)
        page = begin_read(guest)
        chain = back.take(0)
        guest.stop()
        log.take()
        before = guest.ram.view(page * PAGE, SECTOR).tobytes()
        back.complete(chain, b"late" * 128 + b"\0")
        guest.front.barrier()
        assert log.take() == set()
        assert guest.ram.view(page * PAGE, SECTOR).tobytes() == before

    def test_a_device_that_was_reset_is_logged_when_it_starts_again(
        self, airlock, back, log
    ):
        back.protocol_offered |= int(ProtocolFeature.RESET_DEVICE)
        also = [ProtocolFeature.LOG_SHMFD, ProtocolFeature.RESET_DEVICE]
        with small_guest(also=also) as guest:
            guest.connect(airlock.channel())
            guest.start()
            use(guest, log)
            log_all(guest)
            guest.front.reset_device()
            for queue in guest.queues:
                queue.reset()
            guest.features |= Feature.LOG_ALL
            log.take()
            guest.start()
            log.take()
            page = read(guest, back)
            assert marked(guest, log) == all_written(guest, page)

    def test_the_next_session_knows_nothing_of_the_log(self, airlock, guest, back, log):
        guest.start()
        use(guest, log)
        log_all(guest)
        guest.disconnect()
        airlock.join()
        log.take()
        with small_guest() as other:
            other.connect(airlock.channel())
            other.start()
            serve(back, other)
        assert log.take() == set()

    def test_sessions_leave_no_descriptor(self, airlock, back, log):
        fds = 0
        for turn in range(4):
            told = eventfd()
            with small_guest(also=[ProtocolFeature.LOG_SHMFD]) as guest:
                guest.connect(airlock.channel())
                guest.start()
                guest.front.set_log_fd(told)
                for _ in range(3):
                    use(guest, log)
                log_all(guest)
                serve(back, guest)
            told.close()
            airlock.join()
            back.join()
            back.forget_seen()
            if turn == 1:
                fds = len(os.listdir("/proc/self/fd"))
        assert len(os.listdir("/proc/self/fd")) == fds


def all_run_again(airlock: Airlock, back: ScriptedBack) -> bool:
    rings = airlock.session.device.rings.values()
    return back.connections == 2 and all(r.state is State.RUNNING for r in rings)


class TestLostBack:
    @pytest.fixture
    def airlock(self, back: ScriptedBack) -> Iterator[Airlock]:
        with Airlock(back, recover=True, drain_timeout=0.2) as airlock:
            yield airlock

    def test_logging_goes_on_with_the_next_back(self, guest, back, airlock, log):
        guest.start()
        use(guest, log)
        log_all(guest)
        page = begin_read(guest)
        back.take(0)
        lose(back)
        wait_until(lambda: all_run_again(airlock, back), "another back comes")
        end_read(guest, back)
        assert all_written(guest, page) <= log.take()
        page = read(guest, back)
        assert marked(guest, log) == all_written(guest, page)
        assert not any(
            seen.payload.value & Feature.LOG_ALL
            for seen in back.got(Request.SET_FEATURES)
        )

    def test_a_log_that_comes_while_there_is_no_back(self, guest, back, airlock, log):
        guest.start()
        page = begin_read(guest)
        back.take(0)
        airlock.away = True
        lose(back)
        wait_until(lambda: airlock.session.device.back_side.away, "the loss is seen")
        use(guest, log)
        log_all(guest)
        airlock.away = False
        wait_until(lambda: all_run_again(airlock, back), "another back comes")
        end_read(guest, back)
        assert all_written(guest, page) <= log.take()


def read_only(size: int) -> Fd:
    made = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(made, size)
    fd = Fd(os.open(f"/proc/self/fd/{made}", os.O_RDONLY | os.O_CLOEXEC))
    os.close(made)
    return fd


def pipe() -> Fd:
    reader, writer = os.pipe()
    os.close(writer)
    return Fd(reader)


TOP = (1 << 64) - 1


@pytest.mark.parametrize(
    ("told", "make", "reason"),
    [
        (Log(PAGE, TOP), None, "the log ends at 0x10000000000000fff of"),
        (Log(TOP, TOP), None, "the log ends at 0x1fffffffffffffffe of"),
        (Log(TOP, 1), None, "the log ends at 0x10000000000000000 of"),
        (Log(TOP - PAGE, PAGE), None, "the log ends at 0xffffffffffffffff of"),
        (Log(PAGE + 1, 0), None, "the log ends at 0x1001 of a file of 0x1000 bytes"),
        (Log(PAGE, 1), None, "the log ends at 0x1001 of a file of 0x1000 bytes"),
        (Log(0, 0), None, "mmap_size is 0"),
        (Log(PAGE, 0), read_only, "[Errno 13] cannot map 4096 bytes"),
        (Log(PAGE, 0), lambda size: pipe(), "the descriptor is not of a file"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_bad_log_ends_the_session(airlock, back, caplog, told, make, reason):
    """CVE-2020-10722, and others. No reply says no, so the session can't go on."""
    with small_guest(also=[ProtocolFeature.LOG_SHMFD]) as guest:
        guest.connect(airlock.channel())
        guest.start()
        if make is None:
            fd = Fd(os.memfd_create("log", os.MFD_CLOEXEC))
            os.ftruncate(fd.fileno(), PAGE)
        else:
            fd = make(PAGE)
        with pytest.raises(Disconnected):
            guest.front.set_log_base(told.size, told.offset, fd)
        fd.close()
    airlock.join()
    assert f"refused: SET_LOG_BASE: {reason}" in "\n".join(errors(caplog))


def test_without_a_descriptor_there_is_no_log(airlock, guest):
    channel = guest.front.channel
    channel.send(Request.SET_LOG_BASE, Log(PAGE).pack())
    assert hung_up(channel)


def test_a_log_that_is_cut_short_breaks_rings_and_nothing_else(guest, back, airlock):
    guest.start()
    with closing(LogFile.up_to(END)) as log:
        use(guest, log)
        log_all(guest)
        read(guest, back)
        begin_read(guest)
        chain = back.take(0)
        log.cut()
        back.complete(chain, b"d" * SECTOR + b"\0")
        wait_until(
            lambda: airlock.session.device.rings[0].condition()["fault"] is not None,
            "the ring breaks",
        )
        guest.front.barrier()
    with closing(LogFile.up_to(END)) as log:
        use(guest, log)
        guest.stop()
        guest.front.barrier()
