# SPDX-License-Identifier: Apache-2.0
"""A front-end that gets messages wrong is told which, and hurts nobody but itself."""

from __future__ import annotations

import logging
import os
import re
import socket
import struct
from collections.abc import Iterator, Sequence

import pytest

from tests.support.airlock import Airlock, hung_up
from tests.support.backs import DiskBack
from tests.support.sessions import await_reaped
from tests.support.vmm import CloudHypervisor
from vhost_airlock.errors import PeerRefused
from vhost_airlock.peers.disk import BlkType
from vhost_airlock.proxy.handlers import REFUSED
from vhost_airlock.vhost.fds import Fd, eventfd
from vhost_airlock.vhost.frontend import Frontend
from vhost_airlock.vhost.rules import RULES
from vhost_airlock.vhost.wire import (
    U64,
    Feature,
    Header,
    HeaderFlag,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    Request,
    VringAddr,
    VringFd,
    VringState,
)

R = Request
VERSION, NEED_REPLY = HeaderFlag.VERSION, HeaderFlag.NEED_REPLY
PAGE = 4096
TOP = 1 << 64


@pytest.fixture
def airlock() -> Iterator[Airlock]:
    with Airlock(DiskBack(num_queues=4)) as airlock:
        yield airlock


@pytest.fixture
def vmm(airlock: Airlock) -> Iterator[CloudHypervisor]:
    """Rings 0 and 1 run, ring 2 is set up but for its kick, 3 was never heard of."""
    with CloudHypervisor(num_queues=3) as vmm:
        third = vmm.queues.pop()
        vmm.open(airlock.channel())
        vmm.front.set_vring_num(2, third.size)
        vmm.front.set_vring_addr(third.vring_addr(vmm.ram))
        vmm.work()
        yield vmm
        third.close()


@pytest.fixture
def files() -> Iterator[dict[str, Fd]]:
    """Descriptors of all kinds."""
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    files = {
        "eventfd": eventfd(),
        "memfd": Fd(os.memfd_create("guest-ram", os.MFD_CLOEXEC)),
        "source": Fd(os.open(__file__, os.O_RDONLY | os.O_CLOEXEC)),
        "folder": Fd(os.open("/", os.O_RDONLY | os.O_CLOEXEC)),
        "out": Fd(ours),
        "into": Fd(theirs),
        "socket": Fd(socket.socket(socket.AF_UNIX).detach()),
        "null": Fd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)),
    }
    os.ftruncate(files["memfd"].fileno(), 4 * PAGE)
    yield files
    for fd in files.values():
        fd.close()


def region(guest: int, size: int, user: int, offset: int = 0) -> bytes:
    return MemoryRegion(guest, size, user, offset).pack()


def table(*regions: tuple[int, int, int, int]) -> bytes:
    return MemoryTable(tuple(MemoryRegion(*each) for each in regions)).pack()


def addr(index: int = 2, desc: int = 0x1000, used: int = 0x3000, avail: int = 0x2000):
    return VringAddr(index, 0, desc, used, avail).pack()


FREE = 1 << 40
"""Guest and user address where nothing is."""

Case = tuple[int, bytes, Sequence[str], str]

REFUSED_ONES: dict[str, Case] = {
    **{
        f"num {num}": (
            R.SET_VRING_NUM,
            VringState(2, num).pack(),
            [],
            f"SET_VRING_NUM: ring 2: {num} entries",
        )
        for num in (0, 3, 65536, 0xFFFFFFFF)
    },
    "num, running": (
        R.SET_VRING_NUM,
        VringState(0, 64).pack(),
        [],
        "SET_VRING_NUM: ring 0 is started",
    ),
    "base": (
        R.SET_VRING_BASE,
        VringState(2, 0x10000).pack(),
        [],
        "SET_VRING_BASE: ring 2: base 0x10000",
    ),
    "base, running": (
        R.SET_VRING_BASE,
        VringState(1, 7).pack(),
        [],
        "SET_VRING_BASE: ring 1 is started",
    ),
    "desc": (R.SET_VRING_ADDR, addr(desc=0x1008), [], "ring 2: desc 0x1008 is not al"),
    "used": (R.SET_VRING_ADDR, addr(used=0x3002), [], "ring 2: used 0x3002 is not al"),
    "avail": (R.SET_VRING_ADDR, addr(avail=1), [], "ring 2: avail 0x1 is not aligned"),
    "addr, running": (
        R.SET_VRING_ADDR,
        addr(0, desc=0x1001),
        [],
        "ring 0: desc 0x1001 is not aligned to 16",
    ),
    "addr of nothing, running": (
        R.SET_VRING_ADDR,
        addr(0),
        [],
        "SET_VRING_ADDR: ring 0 is not in the guest's memory",
    ),
    "polled kick": (
        R.SET_VRING_KICK,
        VringFd(2, nofd=True).pack(),
        [],
        "SET_VRING_KICK: ring 2: polling mode",
    ),
    **{
        f"kick on {kind}{running}": (
            R.SET_VRING_KICK,
            VringFd(index).pack(),
            [kind],
            f"SET_VRING_KICK: ring {index}: descriptor .* cannot be waited for",
        )
        for kind in ("memfd", "source", "folder")
        for index, running in ((0, ", running"), (2, ""))
    },
    "features not offered": (
        R.SET_FEATURES,
        U64(Feature.VERSION_1 | Feature.RING_PACKED).pack(),
        [],
        "SET_FEATURES: bits 0x400000000 were not offered",
    ),
    "features, running": (
        R.SET_FEATURES,
        U64(Feature.VERSION_1).pack(),
        [],
        "SET_FEATURES: 0x100000000: ring 0 is started and enabled",
    ),
    "protocol features not offered": (
        R.SET_PROTOCOL_FEATURES,
        U64(ProtocolFeature.REPLY_ACK | ProtocolFeature.SHMEM_MAP).pack(),
        [],
        "SET_PROTOCOL_FEATURES: 0x400000 were not offered",
    ),
    "region of size 0": (R.ADD_MEM_REG, region(FREE, 0, FREE), ["memfd"], "size 0"),
    "region that overlaps": (
        R.ADD_MEM_REG,
        region(PAGE, PAGE, FREE),
        ["memfd"],
        r"overlaps MemoryRegion\(guest_addr=0",
    ),
    "region that wraps": (
        R.ADD_MEM_REG,
        region(TOP - PAGE, 2 * PAGE, FREE),
        ["memfd"],
        "guest address wraps round",
    ),
    "region beyond its file": (
        R.ADD_MEM_REG,
        region(FREE, 2 * PAGE, FREE, 3 * PAGE),
        ["memfd"],
        "ends at 0x5000 of a file of 0x4000 bytes",
    ),
    **{
        f"region of {kind}": (
            R.ADD_MEM_REG,
            region(FREE, 64, FREE),
            [kind],
            r"can't be mapped \(.*\)",
        )
        for kind in ("eventfd", "source", "folder", "out", "socket", "null")
    },
    "table that overlaps": (
        R.SET_MEM_TABLE,
        table((0, PAGE, 0, 0), (FREE, PAGE, 0, PAGE)),
        ["memfd", "memfd"],
        "overlaps",
    ),
    "table of a pipe": (
        R.SET_MEM_TABLE,
        table((0, PAGE, 0, 0), (FREE, PAGE, FREE, PAGE)),
        ["memfd", "into"],
        "can't be mapped",
    ),
    "region that is not there": (
        R.REM_MEM_REG,
        region(FREE, PAGE, FREE),
        [],
        r"REM_MEM_REG: there is no such region: MemoryRegion\(guest_addr=1099511627776",
    ),
    "region that is not there, with a descriptor": (
        R.REM_MEM_REG,
        region(FREE, PAGE, FREE),
        ["memfd"],
        "REM_MEM_REG: there is no such region",
    ),
    **{
        f"{request.name} of ring {index}": (
            request,
            data(index),
            [],
            f"{request.name}: index is {index}, not 0 to 255",
        )
        for request, data in {
            R.SET_VRING_NUM: lambda index: VringState(index, 64).pack(),
            R.SET_VRING_BASE: lambda index: VringState(index, 0).pack(),
            R.SET_VRING_ENABLE: lambda index: VringState(index, 1).pack(),
            R.SET_VRING_ADDR: lambda index: addr(index),
        }.items()
        for index in (256, 0x80000000, 0xFFFFFFFF)
    },
    "enable with 2": (
        R.SET_VRING_ENABLE,
        VringState(0, 2).pack(),
        [],
        "SET_VRING_ENABLE: num is 2, not 0 to 1",
    ),
    "unknown": (45, b"", [], "request 45 is unknown"),
    "unknown, with all": (
        0xFFFFFFFF,
        b"x" * 4096,
        ["memfd"] * 32,
        "request 4294967295",
    ),
}


def send(vmm: CloudHypervisor, case: Case, files: dict[str, Fd], flags: int) -> None:
    request, data, kinds, _ = case
    fds = [files[kind] for kind in kinds]
    vmm.front.channel.send(request, data, fds, flags=flags)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of log at the default level."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("case", REFUSED_ONES.values(), ids=list(REFUSED_ONES))
def test_refused_message_is_told_and_changes_nothing(
    vmm: CloudHypervisor,
    case: Case,
    files: dict[str, Fd],
    caplog: pytest.LogCaptureFixture,
) -> None:
    send(vmm, case, files, VERSION | NEED_REPLY)
    with vmm.front.channel.recv() as answer:
        assert answer.request == case[0]
        assert answer.flags == VERSION | HeaderFlag.REPLY
        assert U64.unpack(answer.payload).value != 0
        assert not answer.fds
    (line,) = errors(caplog)
    assert line.startswith("VMM: refused: ")
    assert "\n" not in line
    assert_found(case[3], line)
    vmm.work()
    vmm.set_table()
    vmm.work()
    vmm.stop()
    vmm.start()
    vmm.work()


def assert_found(pattern: str, line: str) -> None:
    assert re.search(pattern, line), line


@pytest.mark.parametrize("case", REFUSED_ONES.values(), ids=list(REFUSED_ONES))
def test_refused_message_without_an_ack_ends_the_session(
    airlock: Airlock,
    vmm: CloudHypervisor,
    case: Case,
    files: dict[str, Fd],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Else its sender would go on as if all were well."""
    send(vmm, case, files, VERSION)
    assert hung_up(vmm.front.channel)
    airlock.join()
    line = errors(caplog)[-1]
    assert line.startswith("VMM: can't be told no: ")
    assert_found(case[3], line)
    assert_serves(airlock)


def assert_serves(airlock: Airlock) -> None:
    """The next front-end is none the worse for it."""
    with CloudHypervisor() as other:
        other.open(airlock.channel())
        other.work()


IMPOSSIBLE: dict[str, Case] = {
    "kick without a descriptor": (
        R.SET_VRING_KICK,
        VringFd(0).pack(),
        [],
        "with 0 fds",
    ),
    "kick with and without": (
        R.SET_VRING_KICK,
        VringFd(0, nofd=True).pack(),
        ["eventfd"],
        "impossible with 1 fds: .*nofd=True",
    ),
    "call with two": (
        R.SET_VRING_CALL,
        VringFd(0).pack(),
        ["eventfd"] * 2,
        "SET_VRING_CALL: impossible with 2 fds",
    ),
    "table with too few": (
        R.SET_MEM_TABLE,
        table((0, PAGE, 0, 0), (FREE, PAGE, FREE, 0)),
        ["memfd"],
        "SET_MEM_TABLE: impossible with 1 fds",
    ),
    "table with too many": (
        R.SET_MEM_TABLE,
        table((0, PAGE, 0, 0)),
        ["memfd"] * 32,
        "SET_MEM_TABLE: impossible with 32 fds",
    ),
    "table that is cut off": (
        R.SET_MEM_TABLE,
        table((0, PAGE, 0, 0))[:-1],
        ["memfd"],
        "SET_MEM_TABLE: 39 bytes can't hold 1 memory regions",
    ),
    "table of 2^32 - 1": (
        R.SET_MEM_TABLE,
        struct.pack("<II", 0xFFFFFFFF, 0),
        [],
        "can't hold 4294967295 memory regions",
    ),
    "region without": (R.ADD_MEM_REG, region(FREE, PAGE, FREE), [], "0 fds, not 1"),
    **{
        f"{request.name}, {kind}": (
            request,
            b"x" * size,
            [],
            f"VMM: (request {request} has|{request.name}: .* has) {size} bytes",
        )
        for request in (R.SET_FEATURES, R.SET_OWNER, R.SET_VRING_ADDR, R.SET_VRING_KICK)
        for kind, size in {
            "too short": RULES[request].payload.MIN_SIZE - 1,
            "too long": RULES[request].payload.MAX_SIZE + 1,
        }.items()
        if size >= 0
    },
    **{
        f"{request.name} with a descriptor": (
            request,
            bytes(RULES[request].payload.MIN_SIZE),
            ["memfd"],
            f"VMM: {request.name}: 1 fds, not 0",
        )
        for request in (R.GET_FEATURES, R.SET_OWNER, R.SET_VRING_NUM, R.GET_VRING_BASE)
    },
}


@pytest.mark.parametrize("case", IMPOSSIBLE.values(), ids=list(IMPOSSIBLE))
@pytest.mark.parametrize("flags", [VERSION, VERSION | NEED_REPLY], ids=["", "acked"])
def test_impossible_message_ends_the_session(
    airlock: Airlock,
    vmm: CloudHypervisor,
    case: Case,
    flags: int,
    files: dict[str, Fd],
    caplog: pytest.LogCaptureFixture,
) -> None:
    send(vmm, case, files, flags)
    assert hung_up(vmm.front.channel)
    airlock.join()
    (line,) = errors(caplog)
    assert_found(case[3], line)
    assert_serves(airlock)


@pytest.mark.parametrize("index", [256, 0x80000000, 0xFFFFFFFF])
def test_base_of_a_ring_that_can_not_be_ends_the_session(
    airlock: Airlock, vmm: CloudHypervisor, index: int, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no reply that says no."""
    data = VringState(index).pack()
    vmm.front.channel.send(R.GET_VRING_BASE, data, flags=VERSION | NEED_REPLY)
    assert hung_up(vmm.front.channel)
    airlock.join()
    line = errors(caplog)[-1]
    assert_found(f"VMM: can't be told no: GET_VRING_BASE: index is {index},", line)
    assert_serves(airlock)


@pytest.mark.parametrize("flags", [0, 2, 3, 1 << 2, 1 << 4 | 1, 0xFFFFFFFF, 5])
def test_impossible_flags_end_the_session(
    airlock: Airlock,
    vmm: CloudHypervisor,
    flags: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    vmm.front.channel.send(R.GET_FEATURES, b"", flags=flags)
    assert hung_up(vmm.front.channel)
    airlock.join()
    (line,) = errors(caplog)
    assert_found(f"VMM: (.* flags {flags:#x}|sent a reply)", line)
    assert_serves(airlock)


def raw(vmm: CloudHypervisor, data: bytes) -> None:
    with socket.socket(fileno=os.dup(vmm.front.fileno())) as sock:
        sock.sendall(data)


@pytest.mark.parametrize("count", [1, 4, 11, 12, 13, 19])
def test_message_that_is_cut_off_ends_the_session(
    airlock: Airlock,
    vmm: CloudHypervisor,
    count: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = Header(R.SET_FEATURES, VERSION, 8).pack() + U64(0).pack()
    raw(vmm, whole[:count])
    vmm.disconnect()
    airlock.join()
    assert errors(caplog) in (
        [],
        ["VMM: closed the connection in the middle of a message"],
    )
    assert_serves(airlock)


def test_message_that_does_not_go_on_ends_the_session(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Airlock(DiskBack(num_queues=2), timeout=0.2) as airlock:
        with CloudHypervisor() as vmm:
            vmm.open(airlock.channel())
            vmm.work()
            raw(vmm, Header(R.SET_FEATURES, VERSION, 8).pack() + b"half")
            assert hung_up(vmm.front.channel)
        assert errors(caplog) == ["VMM: did not answer in time"]
        assert_serves(airlock)


def test_size_that_is_too_large_is_not_waited_for(
    airlock: Airlock, vmm: CloudHypervisor, caplog: pytest.LogCaptureFixture
) -> None:
    raw(vmm, Header(R.SET_FEATURES, VERSION, 0xFFFFFFFF).pack())
    assert hung_up(vmm.front.channel)
    airlock.join()
    assert errors(caplog) == [
        "VMM: request 2 has 4294967295 bytes, at most 8 are possible"
    ]


def test_more_descriptors_than_a_message_can_have_end_the_session(
    airlock: Airlock,
    vmm: CloudHypervisor,
    files: dict[str, Fd],
    caplog: pytest.LogCaptureFixture,
) -> None:
    vmm.front.channel.send(R.SET_OWNER, b"", [files["memfd"]] * 253)
    assert hung_up(vmm.front.channel)
    airlock.join()
    assert errors(caplog) == ["VMM: sent more fds than we can take"]
    assert_serves(airlock)


@pytest.mark.parametrize("request_", sorted(REFUSED))
def test_request_for_what_is_not_offered_is_refused(
    vmm: CloudHypervisor,
    request_: Request,
    files: dict[str, Fd],
    caplog: pytest.LogCaptureFixture,
) -> None:
    rule = RULES[request_]
    count = rule.fds[0] if rule.fds else 0
    fds = [files["memfd"]] * count
    data = bytes(rule.payload.MIN_SIZE)
    vmm.front.channel.send(request_, data, fds, flags=VERSION | NEED_REPLY)
    if rule.refusal is None:
        assert hung_up(vmm.front.channel)
    else:
        with vmm.front.channel.recv() as answer:
            assert answer.request == request_
            assert answer.payload == rule.refusal.pack()
        vmm.work()
    line = errors(caplog)[0]
    assert request_.name in line
    assert_found("needs protocol feature" if rule.needs else REFUSED[request_], line)


@pytest.mark.parametrize("kind", ["source", "folder", "null", "out", "memfd", "socket"])
def test_useless_descriptors_for_notifications_do_no_harm(
    vmm: CloudHypervisor, files: dict[str, Fd], kind: str
) -> None:
    """Nobody is told then, which is the front-end's own fault."""
    front, queue = vmm.front, vmm.queues[0]
    for _ in range(2):
        front.set_vring_call(0, files[kind])
        front.set_vring_err(0, files[kind])
        io = queue.submit(BlkType.FLUSH)
        queue.driver.arm()
        queue.kick()
        queue_two = vmm.queues[1]
        other = queue_two.submit(BlkType.FLUSH)
        queue_two.kick()
        await_reaped(queue_two)
        other.check()
    # The ring breaks, which nobody can be told either.
    queue.driver.ring.avail_idx = queue.driver.next_avail + 1000
    os.eventfd_write(queue.kick_fd.fileno(), 1)
    front.barrier()
    front.get_vring_base(0)
    front.set_vring_call(0, queue.call_fd)
    assert io.kind == BlkType.FLUSH


def test_each_kind_of_refusal_is_logged_once(
    vmm: CloudHypervisor, files: dict[str, Fd], caplog: pytest.LogCaptureFixture
) -> None:
    for case in list(REFUSED_ONES.values())[:4] * 25:
        send(vmm, case, files, VERSION | NEED_REPLY)
        vmm.front.channel.recv().close()
    assert len(errors(caplog)) == 1


def test_ring_can_not_move_to_where_it_is_misaligned(
    vmm: CloudHypervisor, files: dict[str, Fd], caplog: pytest.LogCaptureFixture
) -> None:
    """User addresses are aligned, but the region begins anywhere in its file."""
    odd = MemoryRegion(FREE, 3 * PAGE, FREE, 4)
    vmm.front.add_mem_region(odd, files["memfd"])
    moved = addr(0, FREE, FREE + PAGE, FREE + 2 * PAGE)
    vmm.front.channel.send(R.SET_VRING_ADDR, moved, flags=VERSION | NEED_REPLY)
    with vmm.front.channel.recv() as answer:
        assert U64.unpack(answer.payload).value != 0
    assert errors(caplog) == ["VMM: refused: ring 0 is misaligned in its file"]
    vmm.work()


def acquainted(vmm: CloudHypervisor, airlock: Airlock) -> Frontend:
    """A front-end that has chosen its protocol features, and no others yet."""
    front = vmm.attach(airlock.channel())
    vmm.use(front.get_features())
    front.negotiate(ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG)
    vmm.set_table()
    return front


def test_ring_starts_when_features_are_set(airlock: Airlock) -> None:
    """Until then, nothing is passed to the back that it can't understand."""
    with CloudHypervisor() as vmm:
        front = acquainted(vmm, airlock)
        for step in (vmm.set_num, vmm.set_base, vmm.set_addr, vmm.set_kick):
            step(0)
        assert R.SET_VRING_KICK not in airlock.back.requests()
        front.set_features(vmm.features)
        assert R.SET_VRING_KICK in airlock.back.requests()


def test_f5_features_may_come_in_two_messages(airlock: Airlock) -> None:
    """crosvm sent them so, the first ones without VERSION_1, and asked for no ack."""
    with CloudHypervisor() as vmm:
        front = acquainted(vmm, airlock)
        first = U64(vmm.features & ~Feature.VERSION_1)
        front.exchange(R.SET_FEATURES, first, need_reply=False)
        front.get_config(0, 8)
        assert R.SET_FEATURES not in airlock.back.requests(), "they are not final"
        front.set_features(vmm.features)
        for step in (vmm.set_num, vmm.set_base, vmm.set_addr, vmm.set_kick):
            step(0)
        assert airlock.back.requests().count(R.SET_FEATURES) == 1
        assert R.SET_VRING_KICK in airlock.back.requests()


def test_ring_of_a_legacy_driver_does_not_start(
    airlock: Airlock, caplog: pytest.LogCaptureFixture
) -> None:
    with CloudHypervisor() as vmm:
        front = acquainted(vmm, airlock)
        front.set_features(Feature.PROTOCOL_FEATURES | Feature.EVENT_IDX)
        for step in (vmm.set_num, vmm.set_base, vmm.set_addr):
            step(0)
        with pytest.raises(PeerRefused, match="SET_VRING_KICK"):
            vmm.set_kick(0)
        front.barrier()
    assert "0x60000000 lacks VIRTIO_F_VERSION_1" in errors(caplog)[0]
    assert R.SET_VRING_KICK not in airlock.back.requests()
