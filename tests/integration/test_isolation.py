# SPDX-License-Identifier: Apache-2.0
"""I1, I2, I7: what the back gets to see, and what one request sees of others."""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.airlock import Airlock
from tests.support.backs import (
    DiskBack,
    RecordedBack,
    ScriptedBack,
    Seen,
    readable,
    wait_until,
)
from tests.support.sessions import await_reaped, serve
from tests.support.vmm import VMMS, Vmm
from vhost_airlock.peers.disk import BlkStatus, BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.ram import MIB, GuestRam
from vhost_airlock.peers.ring import Buffer
from vhost_airlock.proxy.isolated import BASE, RINGS_SIZE
from vhost_airlock.vhost.fds import HasFileno, close_all
from vhost_airlock.vhost.wire import Feature, ProtocolFeature, Request

PAGE = 4096
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
MARK = b"guest's own "
"""Every page of guest memory is full of it, but for rings and requests."""
WORD = struct.Struct("<Q")

WITHOUT = [
    (),
    (Feature.INDIRECT_DESC,),
    (Feature.EVENT_IDX, ProtocolFeature.CONFIGURE_MEM_SLOTS),
]


def content(fd: HasFileno) -> Iterator[tuple[int, bytes]]:
    """All of a file but its holes: where, and what."""
    number, at = fd.fileno(), 0
    while True:
        try:
            at = os.lseek(number, at, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(number, at, os.SEEK_HOLE)
        yield at, os.pread(number, end - at, at)
        at = end


def finds(back: RecordedBack, mark: bytes) -> int:
    """How often the back could find this in all that it ever got."""
    return sum(data.count(mark) for fd in back.memory_fds() for _, data in content(fd))


def identity(fd: HasFileno) -> str:
    """The kernel's text about a descriptor, the same for all copies of it."""
    number = fd.fileno()
    name = os.readlink(f"/proc/self/fd/{number}")
    if "eventfd" in name:
        info = Path(f"/proc/self/fdinfo/{number}").read_text()
        found = re.search(r"eventfd-id: *(\d+)", info)
        assert found is not None
        return f"{name} {found[1]}"
    return f"{name} {os.fstat(number).st_ino}"


def quick(back: ScriptedBack) -> Airlock:
    """An airlock that does not wait for requests which the test leaves unfinished."""
    return Airlock(back, drain_timeout=0.05)


class MarkedGuest(BlkGuest):
    """A guest whose memory is full of MARK, where nothing else was put."""

    def __init__(self, **options: object) -> None:
        super().__init__(
            ram=GuestRam(2 * MIB, 2 * MIB),
            queue_size=32,
            seg_max=14,
            **options,  # type: ignore[arg-type]
        )
        for mapped in self.ram.regions:
            start = self.ram._free[mapped.region.guest_addr] - mapped.region.guest_addr
            size = mapped.region.size
            mapped.view[start:size] = (MARK * (size // len(MARK) + 1))[: size - start]

    def everything(self) -> set[str]:
        """All descriptors that a VMM has for this guest."""
        queues = [(q.kick_fd, q.call_fd, q.err_fd) for q in self.queues]
        memory = [fd for _, fd in self.ram.shared()]
        return {identity(fd) for fd in [*itertools.chain(*queues), *memory]}


def check_descriptors(seen: list[Seen], theirs: set[str]) -> None:
    """I1: memfds of ours which nobody can change, eventfds of ours, and sockets."""
    count = 0
    for message in seen:
        for fd in message.fds:
            count += 1
            what = identity(fd)
            assert what not in theirs, f"{message} has a descriptor of the guest's"
            if message.request in (Request.SET_MEM_TABLE, Request.ADD_MEM_REG):
                assert "/memfd:vhost-airlock-" in what
                assert fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS) & SEALS == SEALS
            elif message.request == Request.SET_BACKEND_REQ_FD:
                assert what.startswith("socket:")
            else:
                assert what.startswith("anon_inode:[eventfd]")
    assert count >= 5


@pytest.mark.parametrize("without", WITHOUT, ids=str)
def test_i1_back_gets_no_descriptor_and_no_byte_of_the_guest(
    without: tuple[Feature | ProtocolFeature, ...],
) -> None:
    """Beyond what it may read. It looks while requests are in flight, and after."""
    features = [f for f in without if isinstance(f, Feature)]
    protocol = [f for f in without if isinstance(f, ProtocolFeature)]
    back = ScriptedBack()
    back.offered &= ~sum(features)
    back.protocol_offered &= ~sum(protocol)
    with Airlock(back) as airlock, MarkedGuest(num_queues=2) as guest:
        guest.connect(airlock.channel())
        guest.start()
        for turn in range(30):
            queue = guest.queues[turn % 2]
            size = (1 << turn % 17) + turn
            out, into = guest.ram.alloc(size), guest.ram.alloc(size)
            assert bytes(guest.ram.view(into, size)) in MARK * (size // 12 + 2)
            guest.ram.view(out, size)[:] = b"o" * size
            wrote = queue.submit(BlkType.OUT, 0, [(out, size)])
            read = queue.submit(BlkType.IN, 0, [(into, size)])
            queue.kick()
            chains = [back.take(queue.index), back.take(queue.index)]
            assert finds(back, MARK[:6]) == 0
            assert finds(back, b"oooooo") > 0 or size < 6
            back.complete(chains[0], index=queue.index)
            back.complete(chains[1], b"i" * size, index=queue.index)
            while queue.pending:
                await_reaped(queue)
            wrote.check()
            read.check()
            assert guest.ram.view(into, size) == b"i" * size
        guest.stop()
        assert finds(back, MARK[:6]) == 0
        check_descriptors(back.seen, guest.everything())


def test_i1_search_finds_what_is_there() -> None:
    """Bytes that the guest writes to the device are there to be found."""
    back = ScriptedBack()
    with quick(back) as airlock, MarkedGuest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        queue = guest.queues[0]
        queue.submit(BlkType.OUT, 0, [(guest.ram.alloc(PAGE), PAGE)])
        queue.kick()
        back.take()
        assert finds(back, MARK) > 300


@pytest.mark.parametrize("kind", VMMS)
def test_i1_holds_for_every_front_end(kind: type[Vmm]) -> None:
    with Airlock(DiskBack(num_queues=4)) as airlock, kind() as vmm:
        theirs = {
            identity(fd)
            for queue in vmm.queues
            for fd in (queue.kick_fd, queue.call_fd, queue.err_fd)
        }
        vmm.open(airlock.channel())
        vmm.work()
        theirs |= {identity(fd) for _, fd in vmm.ram.shared()}
        vmm.stop()
        vmm.disconnect()
        airlock.join()
        check_descriptors(airlock.back.seen, theirs)


class Forbidden:
    """Addresses that the back may not see: the proxy's, the VMM's and the guest's."""

    def __init__(self, ram: GuestRam) -> None:
        maps = Path("/proc/self/maps").read_text().splitlines()
        ranges = [
            tuple(int(part, 16) for part in line.split()[0].split("-")) for line in maps
        ]
        for region in (mapped.region for mapped in ram.regions):
            for start in (region.user_addr, region.guest_addr):
                ranges.append((start, start + region.size))
        # Below that, two small numbers side by side look like an address.
        self.ranges = [(start, end) for start, end in ranges if start >= 1 << 40]

    def check(self, data: bytes, where: str, step: int = 1) -> int:
        """No word at any step is such an address; returns how many are the back's."""
        own = 0
        for at in range(0, len(data) - 7, step):
            (word,) = WORD.unpack_from(data, at)
            own += BASE <= word < 2 * BASE
            for start, end in self.ranges:
                assert not start <= word < end, f"{word:#x} at {at:#x} of {where}"
        return own


HIGH = 0x5_4321_0000_0000
"""Guest memory where no number is by chance."""


@pytest.mark.whole_process
@pytest.mark.parametrize("without", WITHOUT, ids=str)
def test_i2_back_sees_no_address_but_its_own(
    without: tuple[Feature | ProtocolFeature, ...],
) -> None:
    """Not in any message, and not in any ring or table while requests are in flight."""
    back = ScriptedBack(config=b"")
    back.offered &= ~sum(f for f in without if isinstance(f, Feature))
    back.protocol_offered &= ~sum(f for f in without if isinstance(f, ProtocolFeature))
    with quick(back) as airlock, BlkGuest(num_queues=2, queue_size=64) as guest:
        region = guest.ram.plug(HIGH, 4 * MIB)
        guest.connect(airlock.channel())
        guest.start()
        forbidden = Forbidden(guest.ram)
        for queue in guest.queues:
            for turn in range(8):
                buffer = guest.ram.alloc(8 * PAGE, region=region)
                pieces = [(buffer + 100 * i, 100) for i in range(turn)]
                pieces.append((buffer + PAGE + 512, 5 * PAGE))
                kind = BlkType.OUT if turn % 2 else BlkType.IN
                queue.submit(kind, 0, pieces, indirect=bool(turn & 4) and None)
            queue.kick()
            back.take(queue.index)
        rings, *_ = back.memory_fds()
        for address in (buffer, guest.ram.user_addr(buffer), id(guest)):
            with pytest.raises(AssertionError, match="of nowhere"):
                forbidden.check(b"12345" + WORD.pack(address) + b"678", "nowhere")
        words = sum(
            forbidden.check(data, f"the rings at {at:#x}", 8)
            for at, data in content(rings)
        )
        assert words >= 16, "descriptors that are there to be seen"
        messages = 0
        for seen in back.seen:
            # Other numbers could be anything.
            if seen.request in (
                Request.SET_MEM_TABLE,
                Request.ADD_MEM_REG,
                Request.SET_VRING_ADDR,
            ):
                messages += forbidden.check(seen.data, str(seen))
        assert messages >= 6 + 4
        for seen in back.got(Request.SET_VRING_ADDR):
            addr = seen.payload
            for part in (addr.desc, addr.used, addr.avail):
                assert BASE <= part < BASE + RINGS_SIZE
            assert (addr.flags, addr.log) == (0, 0)
        guest.stop()


SIZES = [1, 64, 511, 512, 4096, 5000, 65536]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("policy", ["full", "used", "used+tail"])
@pytest.mark.parametrize("first", [BlkType.OUT, BlkType.IN], ids=["out", "in"])
def test_i7_no_request_sees_another_ones_bytes(
    size: int, policy: str, first: BlkType
) -> None:
    """Neither the guest in what the back did not write, nor the back in what it may."""
    back = ScriptedBack()
    with Airlock(back, copy=policy) as airlock, BlkGuest(num_queues=2) as guest:
        guest.connect(airlock.channel())
        guest.start()
        secret, other = guest.ram.alloc(size), guest.ram.alloc(size)
        guest.ram.view(secret, size)[:] = b"s" * size
        for index, length in itertools.product((0, 1), (0, size + 1, 0xFFFFFFFF)):
            queue = guest.queues[0]
            queue.submit(first, 0, [(secret, size)])
            queue.kick()
            back.complete(back.take(), b"s" * size)
            await_reaped(queue)

            queue = guest.queues[index]
            guest.ram.view(other, size)[:] = b"g" * size
            io = queue.submit(BlkType.IN, 0, [(other, size)])
            queue.kick()
            chain = back.take(index)
            room = b"".join(bytes(piece) for piece in back.room(chain))
            assert room == bytes(size + 1), "the back may write here, and sees nothing"
            back.complete(chain, index=index, length=length)
            await_reaped(queue)
            told = min(length, size + 1)
            copied = size if policy == "full" else min(told, size)
            after = bytes(guest.ram.view(other, size))
            assert after == bytes(copied) + b"g" * (size - copied)
            assert io.written == told


def test_i7_late_writes_of_the_back_go_nowhere() -> None:
    """It writes to the buffers of a request that is completed, when they are another's.

    Whose bytes these are is the back's business. They must not be the guest's.
    """
    back = ScriptedBack()
    with Airlock(back) as airlock, BlkGuest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        (queue,) = guest.queues
        one, two = guest.ram.alloc(PAGE), guest.ram.alloc(PAGE)
        guest.ram.view(one, PAGE)[:] = b"1" * PAGE
        queue.submit(BlkType.OUT, 0, [(one, PAGE)])
        queue.kick()
        chain = back.take()
        back.complete(chain)
        await_reaped(queue)
        with back.memory.view(chain.buffers[1].addr, PAGE) as piece:
            piece[:] = b"x" * PAGE
        assert guest.ram.view(one, PAGE) == b"1" * PAGE, "no buffer to write to"
        serve(back, guest)
        io = queue.submit(BlkType.IN, 0, [(two, PAGE)])
        queue.kick()
        chain = back.take()
        assert b"1" not in b"".join(bytes(piece) for piece in back.room(chain))
        back.complete(chain, b"2" * PAGE)
        await_reaped(queue)
        assert io.status == BlkStatus.OK
        assert guest.ram.view(two, PAGE) == b"2" * PAGE


def test_i1_descriptors_of_length_zero_and_odd_buffers_leak_nothing() -> None:
    """Chains as no block driver makes them; what is around buffers stays away."""
    back = ScriptedBack()
    with Airlock(back) as airlock, MarkedGuest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        (queue,) = guest.queues
        page = guest.ram.alloc(3 * PAGE)
        for offset, length in [(0, 1), (5, 3), (4095, 1), (4090, 600), (1, 4096)]:
            at = page + offset
            guest.ram.view(at, length)[:] = b"r" * length
            queue.driver.offer(
                [
                    Buffer(at, length),
                    Buffer(page, 0),
                    Buffer(page + 2 * PAGE, 700, True),
                    Buffer(page, 0, True),
                ]
            )
            queue.driver.publish()
            os.eventfd_write(queue.kick_fd.fileno(), 1)
            chain = back.take()
            assert [b.length for b in chain.buffers] == [length, 700]
            assert back.read(chain) == b"r" * length
            assert finds(back, MARK[:4]) == 0
            back.complete(chain, b"w" * 700)
            while not list(queue.driver.used()):
                assert queue.driver.arm() or readable(queue.call_fd)


def test_i1_nothing_of_the_guest_is_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not at its most talkative, and not when a ring breaks."""
    caplog.set_level("DEBUG")
    back = ScriptedBack()
    with Airlock(back) as airlock, MarkedGuest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        (queue,) = guest.queues
        buffer = guest.ram.alloc(PAGE)
        guest.ram.view(buffer, PAGE)[:] = (MARK * PAGE)[:PAGE]
        io = queue.submit(BlkType.OUT, 0, [(buffer, PAGE)])
        queue.kick()
        chain = back.take()
        assert MARK in back.read(chain)
        back.complete(chain)
        await_reaped(queue)
        assert io.status == BlkStatus.OK
        queue.driver.ring.avail_idx = queue.driver.ring.avail_idx + 1000
        os.eventfd_write(queue.kick_fd.fileno(), 1)
        wait_until(lambda: "ring 0 is broken" in caplog.text, "it is logged")
        guest.disconnect()
        airlock.join()
    assert MARK.decode().strip() not in caplog.text


def test_i1_after_a_session_nothing_of_it_is_in_the_next() -> None:
    back = ScriptedBack()
    with Airlock(back) as airlock:
        inodes = []
        for _ in range(3):
            with BlkGuest() as guest:
                guest.connect(airlock.channel())
                guest.start()
                serve(back, guest)
                inodes.append(
                    [os.fstat(fd.fileno()).st_ino for fd in back.memory_fds()]
                )
            airlock.join()
            back.join()
            close_all(fd for seen in back.seen for fd in seen.fds)
            back.seen.clear()
        flat = list(itertools.chain(*inodes))
        assert len(set(flat)) == len(flat)
