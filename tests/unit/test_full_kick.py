"""A back that fills its kick eventfd, and makes it blocking, stalls only itself."""

import os
import threading

from vhost_airlock.dataplane.pool import Pool
from vhost_airlock.dataplane.pump import Pump
from vhost_airlock.dataplane.regions import GuestMemory
from vhost_airlock.dataplane.worker import Worker

FULL = 2**64 - 2
PATIENCE = 30.0
"""Seconds that a thread has to get somewhere, on a machine that is busy."""


def asleep_in_write(thread: threading.Thread) -> bool:
    """Is this thread in a write() that waits? (proc(5): /proc/pid/task/tid/syscall)"""
    with open(f"/proc/self/task/{thread.native_id}/syscall") as file:
        return file.read().split()[0] == "1"


def test_i5_a_kick_that_waits_is_interrupted_by_a_pause_and_by_the_end():
    events, kick = os.eventfd(0), os.eventfd(0)
    os.eventfd_write(kick, FULL)
    pump = Pump(0, GuestMemory(), Pool(1 << 20, largest=1 << 20))
    pump.set_fds(kick_out=kick)
    pump.kick()
    worker = Worker(events)
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        for _ in range(2):
            with worker.pause(PATIENCE):
                worker.add(pump)
                pump.kick()
            while not asleep_in_write(thread):
                assert thread.is_alive()
    finally:
        worker.stop()
        thread.join(PATIENCE)
    assert not thread.is_alive()
    assert os.eventfd_read(kick) == FULL
    os.close(events)
    os.close(kick)
