# SPDX-License-Identifier: Apache-2.0
"""`run --stats-path` as its users have it: what it says of the work that is done."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.backs import PATIENCE, DiskBack, ScriptedBack, readable, wait_until
from tests.support.program import LOOKED_INTO, Program, connect, listening
from tests.support.sessions import await_reaped, serve, small_guest
from vhost_airlock import __version__
from vhost_airlock.cli import stats_document
from vhost_airlock.errors import StartError
from vhost_airlock.peers.disk import SECTOR, BlkStatus, BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.process.config import ProcessConfig
from vhost_airlock.process.daemon import Daemon
from vhost_airlock.process.fronts import Accepted
from vhost_airlock.record import replaced
from vhost_airlock.vhost.fds import Fd, notify
from vhost_airlock.vhost.wire import Config, Request

HEADER = 16
"""Bytes that a block device reads of each request before its data."""
STATUS = 1
"""Bytes that it writes after them."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "stats.sock"


@pytest.fixture(autouse=True)
def _busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats_document, "PATIENCE", PATIENCE)


@contextmanager
def running(front: Path, where: Path, path: Path, *options: str) -> Iterator[Program]:
    """A program that ends well, and takes its sockets with it."""
    ways = [f"--socket-path={front}", f"--backend={where}", f"--stats-path={path}"]
    with Program(*ways, *options) as program:
        connect(path, program, socket.SOCK_SEQPACKET).close()  # it listens
        yield program
        assert program.stop() == 0
        assert program.errors() == ""
        assert not path.exists()
        assert not front.exists()


def look(path: Path) -> dict[str, Any]:
    document = json.loads(stats_document.ask(str(path)))
    assert isinstance(document, dict)
    return document


def command(path: Path, *options: str) -> str:
    """What `vhost-airlock stats` prints, which has to end well."""
    done = subprocess.run(
        [sys.executable, "-m", "vhost_airlock", "stats", str(path), *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def start(guest: BlkGuest, program: Program, front: Path) -> None:
    guest.connect(program.connect(front))
    guest.start()


def test_numbers_are_those_of_the_work_done(
    front: Path, path: Path, tmp_path: Path
) -> None:
    size, writes, reads = 4096, 7, 5
    with (
        listening(DiskBack(num_queues=2), tmp_path / "back.sock") as where,
        running(front, where, path, "--workers=2") as program,
        BlkGuest(num_queues=2) as guest,
    ):
        start(guest, program, front)
        buffer = guest.ram.alloc(size)
        for _ in range(writes):
            guest.write(8, [(buffer, size)])
        for _ in range(reads):
            guest.read(8, [(buffer, size)])
        document = look(path)
        assert document["name"] == "front.sock"
        assert document["version"] == __version__
        assert document["sessions"] == 1
        assert document["vmm_connected"] is True
        assert document["backend_connected"] is True
        assert document["rings"] == {
            f"ring {i}": {"phase": "running", "fault": None} for i in range(2)
        }
        counters = document["counters"]
        rings = {"ring 0", "ring 1"}
        assert set(counters) == rings | {"worker 0", "worker 1", "backend", "pool"}
        ring = counters["ring 0"]
        done = writes + reads
        assert (ring["chains"], ring["completions"]) == (done, done)
        assert ring["bytes_in"] == done * HEADER + writes * size
        assert ring["bytes_out"] == done * STATUS + reads * size
        # One at a time: none can share a notification, but the other end may have
        # looked before it was due.
        assert 0 < ring["calls"] <= done
        assert 0 < ring["kicks"] <= done
        assert (ring["outstanding"], ring["quarantined"], ring["faults"]) == (0, 0, 0)
        assert (ring["used"], ring["high_water"]) == (0, size)
        assert not any(counters["ring 1"].values())
        assert counters["worker 0"]["sleeps"] > 0
        pool = counters["pool"]
        assert (pool["used"], pool["high_water"], pool["regions"]) == (0, size, 1)
        assert pool["resident"] >= size
        guest.stop()


def test_without_a_vmm_there_is_nothing_to_count(
    front: Path, path: Path, where: Path, back: ScriptedBack
) -> None:
    nothing = {
        "vmm_connected": False,
        "backend_connected": False,
        "rings": {},
        "counters": {},
    }
    with running(front, where, path) as program:
        assert look(path).items() >= {"sessions": 0, **nothing}.items()
        with small_guest() as guest:
            start(guest, program, front)
            serve(back, guest)
            assert look(path)["vmm_connected"]
        wait_until(lambda: not look(path)["vmm_connected"], "the session ends")
        assert look(path).items() >= {"sessions": 1, **nothing}.items()
        with small_guest() as guest:
            start(guest, program, front)
            serve(back, guest)
            document = look(path)
            assert document["sessions"] == 2
            assert document["counters"]["ring 0"]["chains"] == 1


def test_a_vmm_that_waits_is_seen(
    front: Path, path: Path, where: Path, back: ScriptedBack
) -> None:
    """Behind another VMM."""
    with running(front, where, path, "--log-level=error") as program:
        with small_guest() as guest:
            start(guest, program, front)
            assert not look(path)["vmm_waits"]
            with connect(front, program):
                document = look(path)
                assert (document["vmm_connected"], document["vmm_waits"]) == (
                    True,
                    True,
                )
        wait_until(lambda: not look(path)["vmm_waits"], "it has its turn")


def test_a_vmm_that_waits_for_the_back_end_is_seen(
    front: Path, path: Path, tmp_path: Path
) -> None:
    where = tmp_path / "back.sock"
    with Program(
        f"--socket-path={front}", f"--backend={where}", f"--stats-path={path}"
    ) as program:
        with connect(front, program):
            connect(path, program, socket.SOCK_SEQPACKET).close()
            document = look(path)
            assert (document["vmm_connected"], document["vmm_waits"]) == (False, True)
        assert program.stop() == 0


def test_kept_back_end_is_connected_without_a_vmm(
    front: Path, path: Path, where: Path, back: ScriptedBack
) -> None:
    with running(front, where, path, "--keep-backend") as program:
        with small_guest() as guest:
            start(guest, program, front)
            serve(back, guest)
            guest.stop()
        wait_until(lambda: not look(path)["vmm_connected"], "the session ends")
        assert look(path)["backend_connected"] is True


def test_request_at_the_back_end_is_seen(
    front: Path, path: Path, where: Path, back: ScriptedBack
) -> None:
    with running(front, where, path) as program, small_guest() as guest:
        start(guest, program, front)
        buffer = guest.ram.alloc(SECTOR)
        queue = guest.queues[1]
        io = queue.submit(BlkType.IN, 0, [(buffer, SECTOR)])
        queue.kick()
        chain = back.take(1)
        ring = look(path)["counters"]["ring 1"]
        assert (ring["chains"], ring["completions"], ring["outstanding"]) == (1, 0, 1)
        assert ring["used"] == 4096
        back.complete(chain, b"d" * SECTOR, index=1)
        await_reaped(queue)
        assert io.status == BlkStatus.OK
        ring = look(path)["counters"]["ring 1"]
        assert (ring["completions"], ring["outstanding"], ring["used"]) == (1, 0, 0)


def test_a_back_that_withholds_its_answer_does_not_withhold_this_one(
    front: Path, path: Path, where: Path, back: ScriptedBack
) -> None:
    """The session's thread waits, for up to an hour; the rings go on meanwhile."""
    asked, released = threading.Event(), threading.Event()

    def answer(question: Config, fds: list[Fd]) -> Config:
        asked.set()
        assert released.wait(PATIENCE)
        return replaced(question, data=b"at last!")

    with (
        running(front, where, path, "--timeout=3600") as program,
        small_guest() as guest,
    ):
        start(guest, program, front)
        serve(back, guest)
        back.instead[Request.GET_CONFIG] = answer
        question = Config(0, 8, data=bytes(8))
        guest.front.channel.send(Request.GET_CONFIG, question.pack())
        assert asked.wait(PATIENCE)
        serve(back, guest)
        assert look(path)["counters"]["ring 0"]["completions"] == 2
        assert "completions                  2" in command(path)
        assert not readable(guest.front.channel, 0)
        released.set()
        with guest.front.channel.recv() as message:
            assert message.payload.endswith(b"at last!")


def test_broken_ring_is_named(
    front: Path, path: Path, where: Path, back: ScriptedBack
) -> None:
    ways = [f"--socket-path={front}", f"--backend={where}", f"--stats-path={path}"]
    reason = "the guest's avail index jumps by more than the ring holds: to 1000 from 0"
    with Program(*ways) as program, small_guest() as guest:
        start(guest, program, front)
        guest.queues[0].driver.ring.avail_idx = 1000
        notify(guest.queues[0].kick_fd)
        wait_until(
            lambda: look(path)["rings"]["ring 0"]["fault"] == reason, "the ring breaks"
        )
        document = look(path)
        assert document["counters"]["ring 0"]["faults"] == 1
        assert document["rings"]["ring 1"]["fault"] is None
        assert f"ring 0 is broken: {reason}" in command(path)


def test_who_connects_and_never_reads_does_no_harm(
    front: Path, path: Path, where: Path, back: ScriptedBack
) -> None:
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(10)]
    with (
        running(front, where, path, *LOOKED_INTO) as program,
        small_guest() as guest,
    ):
        start(guest, program, front)
        before = program.holdings()
        for sock in silent:
            sock.connect(str(path))
        serve(back, guest)
        assert look(path)["counters"]["ring 0"]["completions"] == 1
        # It was answered like everybody, and then forgotten.
        assert all(readable(sock) for sock in silent)
        wait_until(lambda: program.holdings().fds == before.fds, "all are closed")
    for sock in silent:
        sock.close()


def test_command_shows_rates_while_a_session_works(
    front: Path, path: Path, where: Path, back: ScriptedBack
) -> None:
    with running(front, where, path) as program, small_guest() as guest:
        start(guest, program, front)
        serve(back, guest)
        heading, *lines = command(path, "--interval=0.05", "--count=3").splitlines()
        assert heading.split()[0] == "requests/s"
        assert [line.split()[0] for line in lines] == ["0", "0", "0"]
        sample = 'ring_chains_total{name="front.sock",ring="0"} 1\n'
        assert sample in command(path, "--prometheus")
        document = json.loads(command(path, "--json"))
        assert document["counters"]["ring 0"]["completions"] == 1


def test_the_vmms_place_is_not_taken(
    front: Path, path: Path, where: Path, back: ScriptedBack
) -> None:
    with running(front, where, path) as program, small_guest() as guest:
        with pytest.raises(StartError, match="the socket is a VMM's or a back-end's"):
            stats_document.ask(str(front))
        document = look(path)
        assert (document["vmm_waits"], document["sessions"]) == (False, 0)
        assert not document["backend_connected"]
        start(guest, program, front)
        serve(back, guest)


def test_path_that_is_in_use_keeps_it_from_starting(
    front: Path, path: Path, where: Path
) -> None:
    with running(front, where, path):
        other = front.with_name("other.sock")
        ways = [f"--socket-path={other}", f"--backend={where}"]
        with Program(*ways, f"--stats-path={path}") as second:
            assert second.wait() == 1
            assert second.errors() == (
                f"vhost-airlock other.sock: error: can't listen at {path}:"
                " another process does\n"
            )
        assert not other.exists()
        assert look(path)["sessions"] == 0


def test_readers_get_no_answer_while_all_else_is_closed(
    front: Path, where: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that answers them would look at sockets that are there no more."""
    close = Accepted.close
    alive = []

    def look_and_close(fronts: Accepted) -> None:
        alive.append([thread.name for thread in threading.enumerate()])
        close(fronts)

    def see_it_run_and_end(*_: object) -> bool:
        alive.append([thread.name for thread in threading.enumerate()])
        return False

    monkeypatch.setattr(Accepted, "wait", see_it_run_and_end)
    monkeypatch.setattr(Accepted, "close", look_and_close)
    daemon = Daemon(
        ProcessConfig(
            socket_path=str(front),
            backend=str(where),
            stats_path=str(path),
            sandbox=False,
        )
    )
    assert daemon.run() == 0
    serving, closing = alive
    assert "airlock-stats" in serving
    assert "airlock-stats" not in closing
