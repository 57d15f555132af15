# SPDX-License-Identifier: Apache-2.0
"""One request that is larger than its ring's share of the pool, or than the pool."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.support.airlock import Airlock
from tests.support.backs import DiskBack, ScriptedBack, readable, wait_until
from tests.support.sessions import await_reaped, errors, serve, wait_for_errors
from vhost_airlock.peers.disk import BlkStatus, BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.guest_queue import Io
from vhost_airlock.peers.ram import MIB, GuestRam
from vhost_airlock.peers.ring import Chain
from vhost_airlock.peers.server import PROTOCOL_FEATURES
from vhost_airlock.proxy.isolated import RINGS_SIZE
from vhost_airlock.vhost.fds import Fd
from vhost_airlock.vhost.wire import Payload, ProtocolFeature, Request

NO_SLOTS = PROTOCOL_FEATURES & ~ProtocolFeature.CONFIGURE_MEM_SLOTS


class Scene:
    def __init__(
        self, back: ScriptedBack, *, queues: int = 2, ram: int = 32, **options: object
    ) -> None:
        self.back = back
        self.airlock = Airlock(back, **{"drain_timeout": 0.2, **options})
        self.guest = BlkGuest(
            ram=GuestRam(MIB, ram * MIB), num_queues=queues, queue_size=64, seg_max=62
        )
        self.guest.connect(self.airlock.channel())
        self.guest.start()

    def close(self) -> None:
        self.guest.close()
        self.airlock.__exit__(None, None, None)

    def submit(self, size: int, index: int = 0) -> tuple[Io, int]:
        """A read into fresh memory; returns it and where that is."""
        queue = self.guest.queues[index]
        buffer = self.guest.ram.alloc(size)
        io = queue.submit(BlkType.IN, 0, [(buffer, size)])
        queue.kick()
        return io, buffer

    def complete(self, chain: Chain, size: int, index: int = 0) -> None:
        """With a mark at either end of the data."""
        data, *_ = self.back.room(chain)
        data[:4], data[-4:] = b"head", b"tail"
        self.back.complete(chain, length=size + 1, index=index)

    def serve(self, size: int, index: int = 0) -> None:
        io, buffer = self.submit(size, index)
        self.complete(self.back.take(index), size, index)
        await_reaped(self.guest.queues[index])
        assert (io.status, io.written) == (BlkStatus.OK, size + 1)
        assert bytes(self.guest.ram.view(buffer, 4)) == b"head"
        assert bytes(self.guest.ram.view(buffer + size - 4, 4)) == b"tail"

    @property
    def sizes(self) -> list[int]:
        """Of the regions that the back has, but for the rings'."""
        regions = [mapped.region for mapped in self.back.memory.regions]
        regions.sort(key=lambda region: region.guest_addr)
        return [region.size for region in regions[1:]]

    @property
    def resident(self) -> int:
        return self.airlock.session.device.counters()["pool"]["resident"]


Play = Callable[..., Scene]


@pytest.fixture
def play() -> Iterator[Play]:
    with ExitStack() as stack:

        def play(back: ScriptedBack | None = None, **options: object) -> Scene:
            scene = Scene(back or ScriptedBack(), **options)  # type: ignore[arg-type]
            stack.callback(scene.close)
            return scene

        yield play


BACKS = {
    "slots": lambda **options: ScriptedBack(**options),
    "three slots": lambda **options: ScriptedBack(slots=3, **options),
    "two slots": lambda **options: ScriptedBack(slots=2, **options),
    "no slots": lambda **options: ScriptedBack(protocol_features=NO_SLOTS, **options),
}


@pytest.fixture(params=BACKS.values(), ids=list(BACKS))
def make_back(request: pytest.FixtureRequest) -> Callable[..., ScriptedBack]:
    make: Callable[..., ScriptedBack] = request.param
    return make


def test_firmware_reads_an_image_in_one_request(
    play: Play, make_back: Callable[..., ScriptedBack]
) -> None:
    """300 MiB, with the default options: more than the whole pool."""
    scene = play(make_back(), ram=301)
    scene.serve(300 * MIB)
    assert scene.airlock.counters()["faults"] == 0
    wait_until(lambda: scene.resident < 64 * MIB, "its memory is given back")
    serve(scene.back, scene.guest, 1)


def test_request_larger_than_a_small_pool(
    play: Play, make_back: Callable[..., ScriptedBack]
) -> None:
    """Again and again: each has memory of its own, and gives it back."""
    scene = play(make_back(), pool_limit=4 * MIB, ram=48)
    for _ in range(4):
        scene.serve(8 * MIB)
        serve(scene.back, scene.guest)
        serve(scene.back, scene.guest, 1)
    wait_until(lambda: scene.resident < 4 * MIB, "its memory is given back")


def test_request_larger_than_the_share_of_four_rings(play: Play) -> None:
    """129 MiB: a block of the pool would have 256 MiB."""
    scene = play(ScriptedBack(num_queues=4), queues=4, ram=131)
    io, _ = scene.submit(129 * MIB, 3)
    chain = scene.back.take(3)
    lone = max(scene.sizes)
    assert 129 * MIB <= lone <= 129 * MIB + 4096, "it has the size of the request"
    scene.complete(chain, 129 * MIB, 3)
    await_reaped(scene.guest.queues[3])
    assert (io.status, io.written) == (BlkStatus.OK, 129 * MIB + 1)
    wait_until(lambda: max(scene.sizes) < 129 * MIB, "the back has to forget it")


def test_many_small_buffers_that_are_more_than_the_share(play: Play) -> None:
    """Each takes a page at least, so these take more than they have bytes."""
    scene = play(pool_limit=64 << 10)
    queue = scene.guest.queues[0]
    buffers = [(scene.guest.ram.alloc(4096), 512) for _ in range(60)]
    io = queue.submit(BlkType.IN, 0, buffers)
    queue.kick()
    chain = scene.back.take()
    scene.back.complete(chain, bytes(range(60)) * 512)
    await_reaped(queue)
    assert io.status == BlkStatus.OK
    got = b"".join(bytes(scene.guest.ram.view(at, size)) for at, size in buffers)
    assert got == (bytes(range(60)) * 512)[: 60 * 512]


def test_data_goes_both_ways() -> None:
    """Written to a disk and read from it, each with one request."""
    size = 12 * MIB
    data = bytes(range(256)) * (size // 256)
    back = DiskBack(sectors=size // 512)
    with (
        Airlock(back, pool_limit=1 * MIB) as airlock,
        BlkGuest(ram=GuestRam(MIB, 32 * MIB), queue_size=16, seg_max=14) as guest,
    ):
        guest.connect(airlock.channel())
        guest.start()
        out, into = guest.ram.alloc(size), guest.ram.alloc(size)
        guest.ram.view(out, size)[:] = data
        guest.write(0, [(out, size)])
        assert back.content(size) == data
        guest.read(0, [(into, size)])
        assert guest.ram.view(into, size) == data


def test_one_large_request_at_a_time(
    play: Play, make_back: Callable[..., ScriptedBack]
) -> None:
    """Other rings wait with theirs, and with those behind; small ones go on."""
    scene = play(make_back(num_queues=3), queues=3, pool_limit=1 * MIB)
    scene.submit(3 * MIB, 0)
    first = scene.back.take(0)
    scene.submit(4 * MIB, 1)
    for _ in range(3):
        serve(scene.back, scene.guest, 2)
    assert list(scene.back.take_all(1)) == []
    scene.complete(first, 3 * MIB, 0)
    scene.complete(scene.back.take(1), 4 * MIB, 1)
    for queue in scene.guest.queues[:2]:
        (io,) = await_reaped(queue)
        assert io.status == BlkStatus.OK


def test_memory_is_bounded_by_both_limits(play: Play) -> None:
    """Both limits hold for any requests: the pool's and the largest request's."""
    scene = play(pool_limit=2 * MIB, request_limit=6 * MIB, ram=64)
    scene.submit(6 * MIB, 0)
    scene.submit(6 * MIB, 1)
    chains = {0: scene.back.take(0)}
    assert sum(scene.sizes) <= 8 * MIB + 4096
    scene.complete(chains[0], 6 * MIB, 0)
    chain = scene.back.take(1)
    assert sum(scene.sizes) <= 8 * MIB + 4096
    scene.complete(chain, 6 * MIB, 1)
    await_reaped(scene.guest.queues[1])


def test_beyond_the_limit_the_log_names_sizes_and_option(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    scene = play(pool_limit=1 * MIB, request_limit=2 * MIB)
    scene.submit(2 * MIB + 512)
    assert readable(scene.guest.queues[0].err_fd)
    (line,) = wait_for_errors(caplog)
    assert f"a request has {2 * MIB + 512} bytes" in line
    assert f"more than {2 * MIB} " in line
    assert "--request-limit" in line
    serve(scene.back, scene.guest, 1)


def test_large_request_of_a_ring_that_stops_is_handed_back(
    play: Play, make_back: Callable[..., ScriptedBack]
) -> None:
    """While it waits for the lone region; the next ring in line gets it."""
    scene = play(make_back(num_queues=3), queues=3, pool_limit=1 * MIB)
    scene.submit(3 * MIB, 0)
    first = scene.back.take(0)
    scene.submit(3 * MIB, 1)
    scene.submit(4 * MIB, 2)
    wait_until(
        lambda: scene.airlock.session.device.rings[2].counters()["stalls"] > 0,
        "both wait",
    )
    assert scene.guest.front.get_vring_base(1) == 0
    scene.complete(first, 3 * MIB)
    scene.complete(scene.back.take(2), 4 * MIB, 2)
    (io,) = await_reaped(scene.guest.queues[2])
    assert io.status == BlkStatus.OK


def test_large_request_that_never_ends_keeps_its_memory(play: Play) -> None:
    """The back may still write there: nobody else gets it."""
    scene = play(pool_limit=1 * MIB)
    scene.submit(3 * MIB, 0)
    chain = scene.back.take(0)
    scene.guest.front.get_vring_base(0)
    before = scene.sizes
    scene.submit(3 * MIB, 1)
    for _ in range(3):
        scene.guest.front.barrier()
    scene.back.room(chain)[0][:4] = b"late"
    assert scene.sizes == before
    assert list(scene.back.take_all(1)) == []


def test_vmm_does_not_wait_while_the_back_takes_memory(play: Play) -> None:
    """The back answers ADD_MEM_REG late: a message that it need not know of is
    answered meanwhile, and the request is served when it has."""
    go_on = threading.Event()
    asked = threading.Event()
    scene = play(pool_limit=1 * MIB, timeout=10.0)

    def slow(region: Payload, fds: list[Fd]) -> object:
        asked.set()
        assert go_on.wait(10)
        return scene.back.answer(Request.ADD_MEM_REG, region, fds)

    scene.back.instead[Request.ADD_MEM_REG] = slow  # type: ignore[assignment]
    io, _ = scene.submit(3 * MIB)
    assert asked.wait(10)
    scene.guest.front.get_features()
    assert not go_on.is_set()
    go_on.set()
    scene.complete(scene.back.take(), 3 * MIB)
    await_reaped(scene.guest.queues[0])
    assert io.status == BlkStatus.OK


def test_back_that_never_answers_is_given_up(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    scene = play(pool_limit=1 * MIB, timeout=0.4)
    end = threading.Event()

    def never(region: Payload, fds: list[Fd]) -> None:
        end.wait(10)

    scene.back.instead[Request.ADD_MEM_REG] = never
    scene.submit(3 * MIB)
    scene.airlock.join()
    end.set()
    assert any("did not answer in time" in line for line in errors(caplog))


def test_back_without_slots_has_room_from_the_start(play: Play) -> None:
    """It costs addresses only, and no message is sent later."""
    back = ScriptedBack(protocol_features=NO_SLOTS)
    scene = play(back, pool_limit=1 * MIB, request_limit=64 * MIB)
    rings, pool = sorted(mapped.region.size for mapped in back.memory.regions)[::-1]
    assert pool == 1 * MIB
    assert rings > RINGS_SIZE + 64 * MIB
    back.forget_seen()
    scene.serve(3 * MIB)
    assert back.requests() == []
