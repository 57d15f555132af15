# SPDX-License-Identifier: Apache-2.0
"""A load that is verified, of a guest and a back-end with a journal.

Each request has sectors of its own until it is done, and a read has to find what was
written last. The back-end keeps requests for a while, executes them in any order, and
each of them as a whole or not at all. Guest and back-end wait for notifications alone,
so one that is lost is noticed.
"""

from __future__ import annotations

import random
import select

from tests.support.backs import PATIENCE, ScriptedBack
from vhost_airlock.peers.disk import SECTOR, BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.guest_queue import GuestQueue, Io
from vhost_airlock.peers.ring import Chain
from vhost_airlock.vhost.fds import drain

SIZE = 32
"""Entries of each ring, and requests that a queue has at the most."""
BYTES = 1024


class Load:
    """A guest with requests in two queues, and the back-end that executes them."""

    def __init__(self, guest: BlkGuest, back: ScriptedBack, seed: int) -> None:
        self.guest = guest
        self.back = back
        self.random = random.Random(seed)
        self.disk: dict[int, bytes] = {}
        """The content of the back-end's disk, by the first sector of a request."""
        self.written: dict[int, bytes] = {}
        """The content that the guest knows to be there."""
        self.free = [2 * i for i in range(2 * SIZE)]
        """The sectors that no request has."""
        self.buffers = [guest.ram.alloc(BYTES) for _ in range(2 * SIZE)]
        self.at_back: list[tuple[int, Chain]] = []
        self.executed: set[tuple[int, int, bytes]] = set()
        """The writes in the journal: queue, sector, and bytes that no other has."""
        self.ended: set[tuple[int, int, bytes]] = set()
        """Those that the guest knows to be done."""
        self.done = 0
        self.again = 0
        """Requests that the back-end has executed before."""

    # The guest.

    def submit(self, queue: GuestQueue) -> None:
        """A read or a write; the bytes of a write occur once."""
        sector = self.free.pop(self.random.randrange(len(self.free)))
        buffer = self.buffers.pop()
        kind = self.random.choice([BlkType.IN, BlkType.OUT])
        view = self.guest.ram.view(buffer, BYTES)
        view[:] = self.random.randbytes(BYTES)
        new = bytes(view)

        def end(io: Io) -> None:
            io.check()
            self.done += 1
            if kind == BlkType.OUT:
                assert (queue.index, sector, new) in self.executed, "never executed"
                self.ended.add((queue.index, sector, new))
                self.written[sector] = new
            else:
                expected = self.written.get(sector, bytes(BYTES))
                assert view == expected, f"sector {sector} has other bytes"
            self.free.append(sector)
            self.buffers.append(buffer)

        segments = [(buffer, SECTOR), (buffer + SECTOR, BYTES - SECTOR)]
        queue.submit(kind, sector, segments, end)

    def offer(self) -> bool:
        """Offer some requests, as many as there is room for."""
        moved = False
        for queue in self.guest.queues:
            room = min(SIZE - queue.pending, len(self.free), len(self.buffers))
            for _ in range(self.random.randint(0, room)):
                self.submit(queue)
                moved = True
            queue.kick()
        return moved

    def reap(self) -> bool:
        return bool(sum(len(queue.reap()) for queue in self.guest.queues))

    # The back-end.

    def execute(self) -> bool:
        """Take what is there, and execute some of what was taken, in any order."""
        moved = False
        for index in range(len(self.guest.queues)):
            for chain in self.back.take_all(index):
                self.at_back.append((index, chain))
                moved = True
        self.random.shuffle(self.at_back)
        for _ in range(self.random.randint(0, len(self.at_back))):
            self.execute_one(*self.at_back.pop())
            moved = True
        return moved

    def execute_one(self, index: int, chain: Chain) -> None:
        answer = self.work(index, chain)
        self.back.complete(chain, answer, index=index)

    def work(self, index: int, chain: Chain) -> bytes:
        """Do a request, and return the bytes of its answer."""
        request = self.back.read(chain)
        kind = int.from_bytes(request[:4], "little")
        sector = int.from_bytes(request[8:16], "little")
        data = request[16:]
        if kind == BlkType.OUT:
            assert (index, sector, data) not in self.ended, "done, and executed again"
            self.again += (index, sector, data) in self.executed
            self.executed.add((index, sector, data))
            self.disk[sector] = data
        else:
            data = self.disk.get(sector, bytes(BYTES))
        return data if kind == BlkType.IN else b""

    # Both.

    def run(self, count: int) -> None:
        """Go on until so many requests more are done."""
        end = self.done + count
        while self.done < end:
            moved = [self.offer(), self.execute(), self.reap()]
            if not any(moved):
                self.wait()

    def finish(self) -> None:
        """Go on until all requests are done."""
        while any(queue.pending for queue in self.guest.queues):
            if not any([self.execute(), self.reap()]):
                self.wait()

    def wait(self) -> None:
        """Wait for a notification of the airlock, unless something was there before."""
        queues = self.guest.queues
        there = [self.back.ring(queue.index).arm() for queue in queues]
        there += [queue.driver.arm() for queue in queues]
        if self.at_back or any(there):
            return
        poll = select.poll()
        fds = [queue.call_fd for queue in self.guest.queues]
        for queue in self.guest.queues:
            kick = self.back.vrings[queue.index].kick
            assert kick is not None
            fds.append(kick)
        for fd in fds:
            poll.register(fd, select.POLLIN)
        assert poll.poll(PATIENCE * 1000), "neither guest nor back-end hears anything"
        for fd in fds:
            drain(fd)

    def lose(self) -> None:
        """The back-end's connection ended, and what it had not executed."""
        self.back.join()
        self.at_back.clear()
