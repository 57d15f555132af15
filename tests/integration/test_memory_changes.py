# SPDX-License-Identifier: Apache-2.0
"""Guest memory that comes and goes while rings run: in effect before it is acked."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.airlock import Airlock
from tests.support.backs import DiskBack, ScriptedBack, readable, wait_until
from tests.support.sessions import await_reaped, errors, serve, wait_for_errors
from tests.support.traffic import SECTORS, Plan, Traffic
from vhost_airlock.errors import PeerRefused
from vhost_airlock.peers.disk import SECTOR, BlkStatus, BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.ram import HIGH, MIB, GuestRam
from vhost_airlock.proxy import ring
from vhost_airlock.proxy.front_memory import MAX_REGIONS
from vhost_airlock.vhost.fds import Fd, drain
from vhost_airlock.vhost.wire import MemoryRegion, ProtocolFeature

PAGE = 4096
PLUGGED = HIGH << 4
"""Guest address of memory that is plugged."""

WAYS = [
    pytest.param((), id="slots"),
    pytest.param((ProtocolFeature.CONFIGURE_MEM_SLOTS,), id="table"),
]


def make_guest(without: tuple[ProtocolFeature, ...] = ()) -> BlkGuest:
    return BlkGuest(num_queues=2, queue_size=32, seg_max=14, without=without)


@pytest.fixture
def airlock(back: ScriptedBack) -> Iterator[Airlock]:
    with Airlock(back, drain_timeout=0.2) as airlock:
        yield airlock


@pytest.fixture(params=WAYS)
def guest(airlock: Airlock, request: pytest.FixtureRequest) -> Iterator[BlkGuest]:
    """Its rings run; it tells of its memory in one way or the other."""
    with make_guest(request.param) as guest:
        guest.connect(airlock.channel())
        guest.start()
        yield guest
        guest.disconnect()


def mapped_twice(name: str) -> int:
    """How many mappings of guest memory there are, the guest's own among them."""
    return Path("/proc/self/maps").read_text().count(name)


@pytest.mark.parametrize("without", WAYS)
def test_memory_comes_and_goes_under_load(without: tuple[ProtocolFeature, ...]) -> None:
    """Each region is used as soon as it is acked, with many requests in flight."""
    back = DiskBack(sectors=SECTORS + 256, num_queues=2)
    with Airlock(back, poll_us=1000) as airlock, make_guest(without) as guest:
        guest.connect(airlock.channel())
        guest.start()
        traffic = Traffic(guest, Plan.make(4))
        kept: list[MemoryRegion] = []
        own = mapped_twice("guest-ram")

        def between(number: int) -> None:
            region = guest.plug(PLUGGED + 2 * number * MIB, MIB)
            kept.append(region)
            buffer = guest.ram.alloc(128 << 10, region=region)
            data = bytes([number + 1]) * (128 << 10)
            guest.ram.view(buffer, len(data))[:] = data
            queue = guest.queues[number % 2]
            for kind in (BlkType.OUT, BlkType.IN):
                io = queue.submit(kind, SECTORS, [(buffer, len(data))])
                queue.kick()
                while io.status is None:
                    guest.wait()
                    for each in guest.queues:
                        each.reap()
                io.check()
                if kind == BlkType.OUT:
                    guest.ram.view(buffer, len(data))[:] = bytes(len(data))
            assert guest.ram.view(buffer, len(data)) == data
            if len(kept) > 2:
                guest.unplug(kept.pop(0))

        traffic.run(between)
        assert mapped_twice("guest-ram") == own + 2 * len(kept)
        while kept:
            guest.unplug(kept.pop())
        assert mapped_twice("guest-ram") == own
        guest.stop()


def test_completion_in_memory_that_is_gone_is_dropped(
    back: ScriptedBack, guest: BlkGuest
) -> None:
    """The unplugged memory may have any use by then. The request itself is done."""
    region = guest.plug(PLUGGED, MIB)
    with Fd.dup(guest.ram.shared()[-1][1]) as file:
        inside = guest.ram.alloc(2 * PAGE, region=region)
        outside = guest.ram.alloc(PAGE)
        guest.ram.view(outside, PAGE)[:] = b"g" * PAGE
        queue = guest.queues[0]
        io = queue.submit(
            BlkType.IN, 0, [(outside, PAGE), (inside, PAGE), (inside + PAGE, PAGE)]
        )
        queue.kick()
        chain = back.take()
        guest.unplug(region)
        back.complete(chain, b"d" * 3 * PAGE)
        await_reaped(queue)
        assert io.status == BlkStatus.OK
        assert guest.ram.view(outside, PAGE) == b"d" * PAGE
        assert os.pread(file.fileno(), MIB, 0) == bytes(MIB)
    serve(back, guest)


def test_request_for_memory_that_is_gone_breaks_its_ring(
    back: ScriptedBack, guest: BlkGuest, caplog: pytest.LogCaptureFixture
) -> None:
    region = guest.plug(PLUGGED, MIB)
    buffer = guest.ram.alloc(PAGE, region=region)
    guest.unplug(region)
    guest.queues[0].submit(BlkType.OUT, 0, [(buffer, PAGE)])
    guest.queues[0].kick()
    (head,) = guest.queues[0].driver.outstanding
    assert wait_for_errors(caplog) == [
        "ring 0 is broken: a descriptor points outside of the guest's memory:"
        f" head {head}, address {buffer:#x}, 4096 bytes"
    ]
    serve(back, guest, 1)


def test_ring_whose_memory_goes_breaks(
    airlock: Airlock,
    back: ScriptedBack,
    guest: BlkGuest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Only that ring, though a request of it is in flight."""
    region = guest.plug(PLUGGED, MIB)
    queue = guest.queues[0]
    addr = queue.vring_addr(guest.ram)
    guest.stop()
    where = guest.ram.user_addr(guest.ram.alloc(PAGE * 2, region=region))
    shift = where - addr.desc
    moved = type(addr)(0, 0, addr.desc + shift, addr.used + shift, addr.avail + shift)
    front = guest.front
    front.set_vring_base(0, 0)
    front.set_vring_addr(moved)
    front.set_vring_kick(0, queue.kick_fd)
    front.set_vring_kick(1, guest.queues[1].kick_fd)
    for index in range(2):
        front.set_vring_enable(index, True)
    serve(back, guest, 1)
    guest.unplug(region)
    assert readable(queue.err_fd)
    drain(queue.err_fd)
    assert wait_for_errors(caplog) == [
        "ring 0 is broken: the ring's own memory is not there any more"
    ]
    serve(back, guest, 1)
    # It can be stopped, and started where there is memory.
    guest.stop()
    queue.reset()
    guest.start()
    serve(back, guest)


def test_memory_that_is_replaced_is_used_at_once(
    back: ScriptedBack, guest: BlkGuest
) -> None:
    """The same addresses, another file: nothing remembers the old one."""
    region = guest.plug(PLUGGED, MIB)
    buffer = guest.ram.alloc(PAGE, region=region)
    queue = guest.queues[0]
    olds = []
    for turn in range(5):
        data = b"%d" % turn * PAGE
        olds.append(Fd.dup(guest.ram.shared()[-1][1]))
        user = region.user_addr
        guest.unplug(region)
        guest.ram._next_user = user
        region = guest.plug(PLUGGED, MIB)
        assert region.user_addr == user
        guest.ram.view(buffer, PAGE)[:] = data
        queue.submit(BlkType.OUT, 0, [(buffer, PAGE)])
        queue.kick()
        chain = back.take()
        assert back.read(chain)[16:] == data
        back.complete(chain)
        await_reaped(queue)
    for old in olds:
        old.close()


def test_regions_that_stay_are_not_mapped_anew(airlock: Airlock) -> None:
    """In any table, and in any order."""
    back = airlock.back
    assert isinstance(back, ScriptedBack)
    with make_guest((ProtocolFeature.CONFIGURE_MEM_SLOTS,)) as guest:
        guest.connect(airlock.channel())
        guest.start()
        memory = airlock.session.device.memory
        users = [mapped.region.user_addr for mapped in guest.ram.regions]
        before = [memory.find(user, 1) for user in users]
        for _ in range(5):
            extra = guest.plug(PLUGGED, MIB)
            guest.front.set_mem_table(list(reversed(guest.ram.shared())))
            serve(back, guest)
            assert [memory.find(user, 1) for user in users] == before
            guest.unplug(extra)
            serve(back, guest)
        assert [memory.find(user, 1) for user in users] == before
        guest.disconnect()


def test_table_that_misaligns_a_ring_breaks_it(
    airlock: Airlock, back: ScriptedBack, caplog: pytest.LogCaptureFixture
) -> None:
    """The same user addresses at an odd place in the file. Then it goes, too."""
    with make_guest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        serve(back, guest)
        shared = [
            (
                MemoryRegion(
                    r.guest_addr, r.size - PAGE, r.user_addr, r.mmap_offset + 4
                ),
                fd,
            )
            for r, fd in guest.ram.shared()
        ]
        guest.front.set_mem_table(shared)
        guest.front.barrier()
        assert sorted(errors(caplog)) == [
            f"ring {i} is broken: the ring's own memory is not there any more"
            for i in range(2)
        ]
        guest.front.set_mem_table([])
        guest.front.set_mem_table(guest.ram.shared())
        guest.stop()
        for queue in guest.queues:
            queue.reset()
        guest.start()
        serve(back, guest)
        serve(back, guest, 1)
        guest.disconnect()


def test_rings_that_are_in_no_memory_are_told(
    airlock: Airlock,
    back: ScriptedBack,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if share=on were missing: once for each ring, which starts if memory comes."""
    monkeypatch.setattr(ring, "MEMORY_TIME", 0.05)
    with make_guest((ProtocolFeature.CONFIGURE_MEM_SLOTS,)) as guest:
        guest.connect(airlock.channel())
        shared = guest.ram.shared
        with monkeypatch.context() as patch:
            patch.setattr(guest.ram, "shared", list)
            guest.start()
        wait_until(lambda: len(errors(caplog)) == 2, "the log has a line for each")
        assert errors(caplog) == [
            f"ring {i} is started, and not in the memory that the VMM shares:"
            " is share=on missing?"
            for i in range(2)
        ]
        assert airlock.session.describe()["rings"] == {
            f"ring {i}": {"phase": "waits for memory", "fault": None} for i in range(2)
        }
        guest.front.set_mem_table(shared())
        serve(back, guest)
        serve(back, guest, 1)
        assert len(errors(caplog)) == 2
        guest.disconnect()


def test_buffer_may_cross_adjacent_regions(
    airlock: Airlock, back: ScriptedBack
) -> None:
    """And only a part of it may be there no more."""
    with make_guest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        first = guest.plug(PLUGGED, MIB)
        second = guest.plug(PLUGGED + MIB, MIB)
        at, size = PLUGGED + MIB - 1000, 3000
        queue = guest.queues[0]
        io = queue.submit(BlkType.IN, 0, [(at, size)])
        queue.kick()
        data = os.urandom(size)
        back.complete(back.take(), data)
        await_reaped(queue)
        assert io.status == BlkStatus.OK
        pieces = guest.ram.views(at, size)
        assert b"".join(bytes(piece) for piece in pieces) == data
        del pieces
        queue.submit(BlkType.OUT, 0, [(at, size)])
        queue.kick()
        chain = back.take()
        assert back.read(chain)[16:] == data
        guest.unplug(second)
        back.complete(chain)
        await_reaped(queue)
        guest.unplug(first)
        guest.disconnect()


def test_as_many_regions_as_we_said(airlock: Airlock, back: ScriptedBack) -> None:
    with make_guest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        slots = guest.front.get_max_mem_slots()
        assert slots == MAX_REGIONS
        room = slots - len(guest.ram.shared())
        with Fd(os.memfd_create("many", os.MFD_CLOEXEC)) as file:
            os.ftruncate(file.fileno(), room * SECTOR)
            for i in range(room + 1):
                at = PLUGGED + i * PAGE
                # Regions in no order, each of a sector that is nowhere near a page.
                region = MemoryRegion(at ^ 0x3F000, SECTOR, at, i % room * SECTOR)
                if i < room:
                    guest.front.add_mem_region(region, file)
                else:
                    with pytest.raises(PeerRefused):
                        guest.front.add_mem_region(region, file)
            serve(back, guest)
            queue = guest.queues[0]
            for i in (0, room // 2, room - 1):
                at = (PLUGGED + i * PAGE) ^ 0x3F000
                queue.submit(BlkType.IN, 0, [(at, SECTOR)])
                queue.kick()
                back.complete(back.take(), b"%03d" % i * 170 + b"xx")
                await_reaped(queue)
                assert os.pread(file.fileno(), 3, i * SECTOR) == b"%03d" % i
        guest.disconnect()


def test_memory_of_a_front_that_is_gone_is_unmapped(airlock: Airlock) -> None:
    own = mapped_twice("guest-ram")
    with make_guest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        assert mapped_twice("guest-ram") == own + 4
        guest.disconnect()
        airlock.join()
        assert mapped_twice("guest-ram") == own + 2


def test_ram_that_is_all_holes_is_no_trouble(
    airlock: Airlock, back: ScriptedBack
) -> None:
    """A VMM may punch holes into it: they read as zeros, and are filled again."""
    with BlkGuest(ram=GuestRam(MIB, MIB), queue_size=32, seg_max=14) as guest:
        guest.connect(airlock.channel())
        guest.start()
        buffer = guest.ram.alloc(PAGE)
        offset = buffer - HIGH + MIB if buffer >= HIGH else buffer
        guest.ram.view(buffer, PAGE)[:] = b"x" * PAGE
        file = guest.ram.shared()[0][1].fileno()
        punch(file, offset, PAGE)
        queue = guest.queues[0]
        queue.submit(BlkType.OUT, 0, [(buffer, PAGE)])
        queue.kick()
        chain = back.take()
        assert back.read(chain)[16:] == bytes(PAGE)
        back.complete(chain)
        await_reaped(queue)
        io = queue.submit(BlkType.IN, 0, [(buffer, PAGE)])
        queue.kick()
        chain = back.take()
        punch(file, offset, PAGE)
        back.complete(chain, b"d" * PAGE)
        await_reaped(queue)
        assert io.status == BlkStatus.OK
        assert guest.ram.view(buffer, PAGE) == b"d" * PAGE


def punch(file: int, offset: int, size: int) -> None:
    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    assert call(file, 3, offset, size) == 0
