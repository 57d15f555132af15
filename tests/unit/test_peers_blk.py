# SPDX-License-Identifier: Apache-2.0
"""The block back-end in a process of its own, and the guest, over a real socket."""

from __future__ import annotations

import json
import random
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vhost_airlock.errors import Disconnected, PeerRefused, RequestRefused
from vhost_airlock.peers.blk import FEATURES, main
from vhost_airlock.peers.blk_process import BlkProcess
from vhost_airlock.peers.disk import BlkStatus, BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.guest_queue import GuestQueue, Io
from vhost_airlock.peers.ram import HIGH, MIB
from vhost_airlock.peers.ring import RingFault, RingFull
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.frontend import Frontend
from vhost_airlock.vhost.wire import (
    Feature,
    MemoryRegion,
    ProtocolFeature,
    Request,
)

SECTORS = 8192
MODULE = [sys.executable, "-m", "vhost_airlock.peers.blk"]

Start = Callable[..., BlkProcess]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SECTORS * 512)
    return path


@pytest.fixture
def start(image: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts back-ends over the image, and ends them."""
    started = []

    def start(**options) -> BlkProcess:
        back = BlkProcess(str(image), str(tmp_path / "blk.sock"), **options)
        started.append(back)
        return back

    yield start
    for back in started:
        back.close()


@pytest.fixture
def guest() -> Iterator[BlkGuest]:
    with BlkGuest(num_queues=2, queue_size=64) as guest:
        yield guest


class Model:
    """Writes and reads at random, never two at a time to the same place, and checks."""

    SLOTS = 40
    PLACE = 64
    """Sectors for each slot, on the disk and in memory."""

    def __init__(self, guest: BlkGuest, seed: int) -> None:
        self.guest = guest
        self.random = random.Random(seed)
        size = self.PLACE * 512
        self.memory = [guest.ram.alloc(2 * size) for _ in range(self.SLOTS)]
        self.disk = bytearray(self.SLOTS * size)
        self.idle = set(range(self.SLOTS))
        self.done = 0

    def submit(self, queue: GuestQueue) -> None:
        slot = self.random.choice(sorted(self.idle))
        first = self.random.randrange(self.PLACE)
        count = self.random.randint(1, self.PLACE - first)
        sector = slot * self.PLACE + first
        segments = self.segments(self.memory[slot], count * 512)
        kind = self.random.choice([BlkType.IN, BlkType.OUT])
        data = self.random.randbytes(count * 512)
        place = slice(sector * 512, (sector + count) * 512)

        def then(io: Io) -> None:
            assert io.status == BlkStatus.OK
            if kind == BlkType.OUT:
                assert io.written == 1
                self.disk[place] = data
            else:
                assert io.written == len(data) + 1
                assert self.gather(segments) == self.disk[place]
            self.idle.add(slot)
            self.done += 1

        if kind == BlkType.OUT:
            self.scatter(segments, data)
        indirect = self.random.choice([None, False])
        direct = self.random.choice([0, 0, 1, 3])
        try:
            queue.submit(kind, sector, segments, then, indirect=indirect, direct=direct)
        except RingFull:
            return
        self.idle.discard(slot)

    def segments(self, addr: int, size: int) -> list[tuple[int, int]]:
        """Pieces of all kinds of sizes, with gaps, in any order."""
        cuts = [self.random.randrange(1, size) for _ in range(self.random.randrange(5))]
        ends = [*sorted(set(cuts)), size]
        pieces = []
        for start, end in zip([0, *ends], ends, strict=False):
            pieces.append((addr + self.random.randrange(8), end - start))
            addr += end - start + 8
        return pieces

    def scatter(self, segments: list[tuple[int, int]], data: bytes) -> None:
        for addr, length in segments:
            self.guest.ram.view(addr, length)[:] = data[:length]
            data = data[length:]

    def gather(self, segments: list[tuple[int, int]]) -> bytes:
        return b"".join(self.guest.ram.view(*segment) for segment in segments)

    def run(self, count: int) -> None:
        """Do so many requests more, without finishing all of them."""
        until = self.done + count
        while self.done < until:
            for queue in self.guest.queues:
                while self.idle and self.random.random() < 0.8:
                    self.submit(queue)
                queue.kick()
            reaped = sum(len(queue.reap()) for queue in self.guest.queues)
            if not reaped and len(self.idle) < self.SLOTS:
                self.guest.wait()


@pytest.mark.parametrize(
    "without",
    [
        [],
        ["event-idx"],
        ["indirect"],
        ["mem-slots"],
        ["reply-ack"],
        ["event-idx", "indirect", "mem-slots", "reply-ack"],
    ],
    ids="-".join,
)
def test_data_survives_with_any_features(
    start: Start, guest: BlkGuest, image: Path, without: list[str]
) -> None:
    back = start(num_queues=2, without=without)
    guest.connect(back.path)
    for name in without:
        feature = FEATURES[name]
        if isinstance(feature, ProtocolFeature):
            assert not guest.front.protocol_features & feature
        else:
            assert not guest.features & feature
    assert guest.capacity == SECTORS
    guest.start()
    assert guest.serial() == "vhost-airlock"
    model = Model(guest, seed=1)
    for _ in range(8):
        model.run(100)
        guest.stop()
        guest.start()
    guest.finish()
    guest.flush()
    assert image.read_bytes()[: len(model.disk)] == model.disk


def test_front_end_may_leave_features_out(start: Start) -> None:
    back = start()
    without = [Feature.EVENT_IDX, Feature.PROTOCOL_FEATURES]
    with BlkGuest(without=without, queue_size=4, seg_max=2) as guest:
        guest.connect(back.path)
        guest.start()
        assert guest.front.protocol_features == ProtocolFeature(0)
        assert guest.do(BlkType.FLUSH).status == BlkStatus.OK


def test_indices_wrap_over_the_socket(start: Start) -> None:
    back = start()
    with BlkGuest(queue_size=128) as guest:
        guest.connect(back.path)
        guest.start()
        (queue,) = guest.queues
        done = 0
        while done < 0x10000 + 1000:
            for _ in range(queue.size):
                queue.submit(99)
            guest.finish()
            done += queue.size
        guest.stop()
        assert queue.base == done & 0xFFFF
        guest.start()
        assert guest.do(99).status == BlkStatus.UNSUPP


def test_what_was_not_fetched_is_handed_back_on_stop(start: Start) -> None:
    back = start()
    with BlkGuest() as guest:
        guest.connect(back.path)
        guest.start()
        guest.flush()
        (queue,) = guest.queues
        ios = [queue.submit(BlkType.FLUSH) for _ in range(5)]
        queue.driver.publish()
        guest.stop()
        assert queue.base == 1
        assert not queue.reap()
        guest.start()
        guest.finish()
        assert [io.status for io in ios] == [BlkStatus.OK] * 5


def test_new_back_end_does_what_the_killed_one_had_not(
    start: Start, guest: BlkGuest, image: Path
) -> None:
    back = start(num_queues=2)
    guest.connect(back.path)
    guest.start()
    model = Model(guest, seed=2)
    for _ in range(3):
        model.run(50)
        back.process.send_signal(signal.SIGSTOP)
        for queue in guest.queues:
            for _ in range(10):
                if model.idle:
                    model.submit(queue)
            queue.kick()
        back.process.kill()
        with pytest.raises(Disconnected):
            guest.finish()
        back.close()
        back = start(num_queues=2)
        guest.reconnect(back.path)
    guest.finish()
    assert len(model.idle) == model.SLOTS
    assert image.read_bytes()[: len(model.disk)] == model.disk


@pytest.mark.parametrize("without", [[], ["mem-slots"]], ids="-".join)
def test_memory_comes_and_goes_under_load(
    start: Start, guest: BlkGuest, without: list[str]
) -> None:
    back = start(num_queues=2, without=without)
    guest.connect(back.path)
    guest.start()
    model = Model(guest, seed=3)
    model.run(50)
    for round in range(5):
        region = guest.plug(HIGH << 1 | round * MIB, MIB)
        for queue in guest.queues:
            while model.idle and model.random.random() < 0.9:
                model.submit(queue)
        buffer = guest.ram.alloc(MIB, region=region)
        guest.ram.view(buffer, MIB)[:] = bytes([round + 1]) * MIB
        guest.write(SECTORS - 2048, [(buffer, MIB)])
        guest.ram.view(buffer, MIB)[:] = bytes(MIB)
        guest.read(SECTORS - 2048, [(buffer, MIB)])
        assert guest.ram.view(buffer, MIB) == bytes([round + 1]) * MIB
        guest.unplug(region)
        with open(f"/proc/{back.pid}/maps") as maps:
            assert maps.read().count("guest-ram") == 2
        model.run(50)


def test_broken_ring_stops_and_the_other_goes_on(start: Start, guest: BlkGuest) -> None:
    back = start(num_queues=2)
    guest.connect(back.path)
    guest.start()
    bad, good = guest.queues
    bad.submit(BlkType.IN, 0, [(HIGH - 4096, 512)])
    bad.kick()
    with pytest.raises(RingFault, match="ring 0 is broken"):
        guest.finish()
    io = good.submit(BlkType.FLUSH)
    good.kick()
    poll = select.poll()
    poll.register(good.call_fd, select.POLLIN)
    while not good.reap():
        assert poll.poll(10_000)
    assert io.status == BlkStatus.OK


def test_front_ends_are_served_one_after_the_other(start: Start) -> None:
    back = start()
    fds = Path(f"/proc/{back.pid}/fd")
    counts = []
    for _ in range(20):
        with BlkGuest() as guest:
            guest.connect(back.path)
            guest.start()
            guest.flush()
            counts.append(len(list(fds.iterdir())))
    assert len(set(counts)) == 1


def test_front_end_that_breaks_the_protocol_is_dropped(start: Start) -> None:
    back = start()
    with Channel.connect(back.path) as channel:
        channel.send(Request.SET_FEATURES, b"short")
        with pytest.raises(Disconnected):
            channel.recv()
    with BlkGuest() as guest:
        guest.connect(back.path)
        guest.start()
        guest.flush()


@pytest.mark.parametrize(
    "request_",
    [
        lambda front: front.set_features(1 << 60),
        lambda front: front.set_vring_num(0, 64),
        lambda front: front.set_vring_base(0, 1),
        lambda front: front.set_vring_num(1, 3),
        lambda front: front.set_vring_num(2, 4),
        lambda front: front.set_vring_kick(1, None),
        lambda front: front.remove_mem_region(MemoryRegion(1, 2, 3)),
        lambda front: front.set_config(0, b"x"),
        lambda front: front.reset_owner(),
    ],
)
def test_impossible_request_is_refused(
    start: Start, request_: Callable[[Frontend], None]
) -> None:
    back = start(num_queues=2)
    with BlkGuest() as guest:
        guest.connect(back.path)
        guest.start()
        with pytest.raises((PeerRefused, RequestRefused)):
            request_(guest.front)
        guest.flush()


def test_ends_on_sigterm_and_removes_its_socket(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    arguments = [f"--socket-path={path}", f"--blk-file={image}"]
    process = subprocess.Popen([*MODULE, *arguments], stderr=subprocess.PIPE)
    try:
        with BlkGuest() as guest:
            while True:
                try:
                    guest.connect(str(path))
                    break
                except Disconnected:
                    assert process.poll() is None
            guest.start()
            guest.flush()
            assert main(arguments) == 1
            process.terminate()
            _, errors = process.communicate(timeout=5)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, errors) == (0, b"")
    assert not path.exists()


def test_regression_signal_that_comes_late_is_passed_over(tmp_path: Path) -> None:
    """While the interpreter ended it was an error, since the eventfd was closed."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert main([f"--socket-path={tmp_path / 's'}", "--blk-file=/nowhere"]) == 1
        for number in before:
            signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_connected_socket_may_be_inherited(image: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [*MODULE, f"--fd={theirs.fileno()}", f"--blk-file={image}"],
            pass_fds=[theirs.fileno()],
        )
    try:
        with BlkGuest() as guest:
            guest.connect(Channel(ours))
            guest.start()
            guest.flush()
        assert process.wait(5) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--fd=99", "--blk-file=/dev/null"], "descriptor 99"),
        (["--fd=0", "--blk-file=/nowhere"], "can't open /nowhere"),
        (["--socket-path=/nowhere/s", "--blk-file=/dev/null"], "/nowhere/s"),
    ],
)
def test_unusable_arguments_are_told_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    assert main(arguments) == 1
    errors = capsys.readouterr().err
    assert line in errors
    assert errors.count("\n") == 1


def test_capabilities(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-capabilities"]) == 0
    assert json.loads(capsys.readouterr().out)["type"] == "block"
