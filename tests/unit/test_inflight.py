# SPDX-License-Identifier: Apache-2.0
"""The record of requests in flight as a file: made, checked, mapped, and let go."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.leftovers import held
from tests.support.profiles import PROFILE
from vhost_airlock.errors import RequestRefused
from vhost_airlock.proxy.inflight import InflightRecord, make_record, room
from vhost_airlock.proxy.state import Vring
from vhost_airlock.vhost.fds import Fd
from vhost_airlock.vhost.wire import Inflight


@pytest.fixture
def record() -> Iterator[InflightRecord]:
    record = InflightRecord()
    yield record
    record.close()


def file_of(size: int) -> Fd:
    fd = Fd(os.memfd_create("record", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(fd.fileno(), size)
    return fd


@pytest.mark.parametrize("size", [1, 2, 3, 4, 64, 128, 1000, 1024, 32768])
def test_the_room_is_that_of_other_back_ends(size: int) -> None:
    """libvhost-user's and DPDK's: 16 bytes and 16 an entry, up to the next 64."""
    assert room(size) == -(-(16 + 16 * size) // 64) * 64


class TestMaking:
    def test_it_has_the_room_that_was_asked_for(self) -> None:
        made, fd = make_record(Inflight(0, 0, 4, 128), [])
        with fd:
            assert made == Inflight(4 * room(128), 0, 4, 128)
            assert os.fstat(fd.fileno()).st_size == made.mmap_size
            assert os.pread(fd.fileno(), made.mmap_size, 0) == bytes(made.mmap_size)

    def test_it_has_room_for_all_rings_that_were_told_of(self) -> None:
        """Cloud Hypervisor asks by the size of its first ring."""
        rings = [Vring(0, num=64), Vring(5, num=1024)]
        made, fd = make_record(Inflight(0, 0, 2, 64), rings)
        fd.close()
        assert made == Inflight(6 * room(1024), 0, 6, 1024)

    def test_its_size_is_for_good(self) -> None:
        _, fd = make_record(Inflight(0, 0, 1, 128), [])
        with fd:
            seals = fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS)
            assert seals & 15 == (
                fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            )
            with pytest.raises(PermissionError):
                os.ftruncate(fd.fileno(), 0)


class TestUsing:
    def test_each_ring_has_its_place(self, record: InflightRecord) -> None:
        made, fd = make_record(Inflight(0, 0, 3, 8), [])
        with fd:
            record.use(made, fd)
        first, entries = record.of_ring(0) or (0, 0)
        assert entries == 8
        assert record.of_ring(2) == (first + 2 * room(8), 8)

    def test_a_ring_beyond_it_has_no_entries(self, record: InflightRecord) -> None:
        """The front passed fewer queues than it uses."""
        made, fd = make_record(Inflight(0, 0, 2, 8), [])
        with fd:
            record.use(made, fd)
        assert record.of_ring(2) == (0, 0)

    def test_without_a_record_no_ring_has_one(self, record: InflightRecord) -> None:
        assert record.of_ring(0) is None
        record.erase()

    def test_the_file_may_be_larger_and_it_may_begin_anywhere(
        self, record: InflightRecord
    ) -> None:
        with file_of(10 * 4096) as fd:
            record.use(Inflight(4096, 4096 + 72, 1, 8), fd)
            address, _ = record.of_ring(0) or (0, 0)
            assert address % 4096 == 72

    def test_another_one_takes_its_place(self, record: InflightRecord) -> None:
        """However often, nothing is left over (CVE-2020-10726)."""
        before = held()
        for _ in range(1000):
            made, fd = make_record(Inflight(0, 0, 2, 128), [])
            with fd:
                record.use(made, fd)
        record.close()
        assert held() == before

    def test_the_one_in_use_stays_if_another_is_refused(
        self, record: InflightRecord
    ) -> None:
        with file_of(room(8)) as fd:
            record.use(Inflight(room(8), 0, 1, 8), fd)
            place = record.of_ring(0)
            with pytest.raises(RequestRefused):
                record.use(Inflight(room(8), 0, 2, 8), fd)
            assert record.of_ring(0) == place

    def test_erasing_forgets_all_rings(self, record: InflightRecord) -> None:
        with file_of(2 * room(4)) as fd:
            os.pwrite(fd.fileno(), b"\1", 8)
            os.pwrite(fd.fileno(), b"\1", room(4) + 8)
            record.use(Inflight(2 * room(4), 0, 2, 4), fd)
            record.erase()
            assert os.pread(fd.fileno(), 2 * room(4), 0) == bytes(2 * room(4))

    def test_erasing_what_is_not_there_does_no_harm(
        self, record: InflightRecord
    ) -> None:
        with file_of(room(4)) as fd:
            record.use(Inflight(room(4), 0, 1, 4), fd)
            os.ftruncate(fd.fileno(), 0)
            record.erase()


class TestRefusing:
    """CVE-2021-3839, and QEMU's issue 4403: numbers that do not fit to each other."""

    @pytest.mark.parametrize(
        ("told", "reason"),
        [
            (Inflight(63, 0, 1, 2), "1 queues of 2 entries take 64 bytes, more than"),
            (Inflight(4096, 0, 65, 2), "65 queues of 2 entries take 4160 bytes"),
            (Inflight(4096, 0, 256, 32768), "256 queues of 32768 entries take"),
            (Inflight(4097, 0, 1, 2), "ends at 0x1001 of a file of 0x1000 bytes"),
            (Inflight(4096, 1, 1, 2), "ends at 0x1001 of a file of 0x1000 bytes"),
            (Inflight(4096, (1 << 64) - 4096, 1, 2), "ends at 0x10000000000000000 of"),
            (Inflight((1 << 64) - 1, 8, 1, 2), "ends at 0x10000000000000007 of"),
            (Inflight(64, 4, 1, 2), "mmap_offset 4 is not aligned to 8"),
        ],
    )
    def test_places_that_can_not_be(
        self, record: InflightRecord, told: Inflight, reason: str
    ) -> None:
        refusal = "^SET_INFLIGHT_FD: "
        with file_of(4096) as fd, pytest.raises(RequestRefused, match=refusal) as no:
            record.use(told, fd)
        assert reason in str(no.value)
        assert record.of_ring(0) is None

    def test_descriptors_of_other_kinds(self, record: InflightRecord) -> None:
        ours, theirs = socket.socketpair()
        refusal = pytest.raises(RequestRefused, match="is not of a file")
        with ours, theirs, Fd.dup(ours) as fd, refusal:
            record.use(Inflight(64, 0, 1, 2), fd)

    def test_a_file_that_can_not_be_written(self, record: InflightRecord) -> None:
        with file_of(4096) as fd:
            other = Fd(os.open(f"/proc/self/fd/{fd.fileno()}", os.O_RDONLY))
            with other, pytest.raises(RequestRefused, match="cannot map"):
                record.use(Inflight(4096, 0, 1, 2), other)


@given(
    st.integers(0, (1 << 64) - 1) | st.integers(0, 9000),
    st.integers(0, (1 << 64) - 1) | st.integers(0, 9000),
    st.integers(1, 256),
    st.integers(1, 32768) | st.integers(1, 64),
)
@settings(PROFILE)
def test_what_is_taken_lies_in_its_file(
    size: int, offset: int, queues: int, entries: int
) -> None:
    record = InflightRecord()
    with file_of(8192) as fd:
        try:
            record.use(Inflight(size, offset, queues, entries), fd)
        except RequestRefused:
            return
    assert offset + queues * room(entries) <= 8192
    record.erase()
    record.close()
