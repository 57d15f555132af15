# SPDX-License-Identifier: Apache-2.0
"""A guest moves with the connections that passt has for it.

passt gives its state to the passt of the destination by DEVICE_STATE, and each has
passt-repair beside it, which may freeze a connection. Both are on one host here, so the
first one has to give up its addresses (--migrate-no-linger). For `make stress`.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from tests.guest import devices
from tests.guest.inside import dialogue
from tests.guest.inside import net as interface
from tests.guest.machine import Guest
from tests.guest.migration import Migration
from tests.real.airlock import reach
from tests.real.backends import passt
from tests.real.network import Network
from tests.real.processes import Process
from tests.real.programs import Programs
from tests.support.profiles import STRESS

pytestmark = pytest.mark.skipif(not STRESS, reason="make stress runs it")

HERE, PORT = "127.0.0.1", 5000
HELD = 48 << 20
OPTIONS = ("--migrate-no-linger",)


@contextmanager
def place(
    programs: Programs, network: Network, folder: Path, via: str, source: Guest | None
) -> Iterator[Guest]:
    """A passt with its helper, and a QEMU in which the guest is, or will be."""
    folder.mkdir()
    path = folder / "net.sock"
    repair = programs(programs.find("passt-repair"), f"{path}.repair")
    with (
        passt(programs, network, path, *OPTIONS),
        Process(repair, folder / "repair.log"),
        reach(via, path, "--device-type=net") as front,
        Guest(programs, folder, devices.net(front), source=source) as guest,
    ):
        yield guest


def answer(listener: socket.socket) -> None:
    """Turn round all that comes on one connection."""
    sock, _ = listener.accept()
    with sock:
        while question := sock.recv(dialogue.SIZE, socket.MSG_WAITALL):
            sock.sendall(question[::-1])


def test_connection_goes_on(programs, folder, via):
    with ExitStack() as stack:
        network = stack.enter_context(closing(Network(programs, folder)))
        with network.entered():
            listener = stack.enter_context(socket.create_server((HERE, PORT)))
        server = threading.Thread(target=answer, args=[listener], daemon=True)
        server.start()
        here = stack.enter_context(place(programs, network, folder / "here", via, None))
        _, router, _ = here.call(interface.configure)
        here.call(dialogue.begin, router, PORT)
        assert here.call(dialogue.ask, "before") == "erofeb"
        there = stack.enter_context(
            place(programs, network, folder / "there", via, here)
        )
        with Migration(here, there, folder / "migration", HELD) as moving:
            assert here.call(dialogue.ask, "during") == "gnirud"
            moving.finish()
        assert there.call(dialogue.ask, "behind") == "dniheb"
        here.kill()
        there.power_off()
    server.join()
