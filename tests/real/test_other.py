# SPDX-License-Identifier: Apache-2.0
"""The library's own front-end and back-end programs of many kinds, request by request.

Each is direct and through the airlock. Meanwhile a marker lies in the guest's memory,
which the back-end must not have.
"""

import errno
import os
import secrets
import socket
import struct
from contextlib import closing

from tests.guest.inside.noise import data
from tests.real.airlock import reach
from tests.real.backends import passt, vhost_device_vsock, virtiofsd
from tests.real.network import Network
from tests.real.processes import Process
from tests.real.testpmd import Testpmd, vhost
from tests.support.client import Client
from tests.support.fuse import QUEUES, Fuse, Op
from vhost_airlock.peers.scan import search
from vhost_airlock.vhost.fds import Fd
from vhost_airlock.vhost.wire import (
    ProtocolFeature,
    StateDirection,
)

MARKER = secrets.token_bytes(16)


def check_isolation(client: Client, process: Process, via: str) -> None:
    client.ram.plant(MARKER)
    found = search(process.pid, [MARKER]).found
    assert bool(found) == (via == "direct")


def test_file_system(programs, folder, via):
    share = folder / "share"
    share.mkdir()
    share.joinpath("theirs").write_bytes(b"from the host")
    content = data(1, 100_000)
    with (
        virtiofsd(programs, share, folder / "fs.sock") as process,
        reach(via, folder / "fs.sock", "--device-type=fs") as front,
        Client(front, QUEUES) as client,
    ):
        client.start()
        fuse = Fuse(client)
        assert fuse.init()[0] == 7
        theirs = fuse.lookup("theirs")
        handle = fuse.open(theirs)
        assert fuse.read(theirs, handle, 5, 100) == b"the host"
        fuse.release(theirs, handle)
        fuse.forget(theirs)

        node, handle = fuse.create("ours")
        fuse.write(node, handle, 0, content)
        fuse.get(Op.FSYNC, node, struct.pack("<QII", handle, 0, 0))
        assert share.joinpath("ours").read_bytes() == content
        assert fuse.read(node, handle, 0, len(content)) == content
        fuse.release(node, handle)
        fuse.get(Op.MKDIR, 1, struct.pack("<II", 0o755, 0), b"folder\0")
        top = fuse.open(1, Op.OPENDIR)
        listing = fuse.read(1, top, 0, 4096, Op.READDIR)
        assert all(name in listing for name in (b"theirs", b"ours", b"folder"))
        assert len(fuse.get(Op.STATFS, 1)) == 80

        assert fuse.get(Op.UNLINK, 1, b"ours\0") == b""
        missing = fuse.ask(Op.LOOKUP, 1, b"ours\0")
        assert isinstance(missing, OSError)
        assert missing.errno == errno.ENOENT
        check_isolation(client, process, via)
        client.stop()
    assert sorted(os.listdir(share)) == ["folder", "theirs"]


def test_state_of_a_file_system_moves(programs, folder, via):
    """As in a migration: what was open there is open here."""
    share = folder / "share"
    share.mkdir()
    content = data(1, 5000)
    state = b""
    for name in ("source", "target"):
        path = folder / f"{name}.sock"
        with (
            virtiofsd(programs, share, path),
            reach(via, path) as front,
            Client(front, QUEUES, protocol=ProtocolFeature.DEVICE_STATE) as client,
        ):
            assert ProtocolFeature.DEVICE_STATE in client.front.protocol_features
            fuse = Fuse(client)
            if name == "source":
                client.start()
                fuse.init()
                node, handle = fuse.create("file")
                fuse.write(node, handle, 0, content)
                client.stop()
                state = save(client)
            else:
                load(client, state)
                client.start()
                assert fuse.read(node, handle, 0, len(content)) == content
                fuse.write(node, handle, len(content), b"and more")
                client.stop()
    assert share.joinpath("file").read_bytes() == content + b"and more"


def save(client: Client) -> bytes:
    """The device's state. The pipe is larger than that."""
    out, into = map(Fd, os.pipe2(os.O_CLOEXEC))
    with out, open(out.fileno(), "rb", closefd=False) as file:
        with into:
            other = client.front.set_device_state_fd(StateDirection.SAVE, into)
        assert other is None
        state = file.read()
        client.front.check_device_state()
    assert state
    return state


def load(client: Client, state: bytes) -> None:
    out, into = map(Fd, os.pipe2(os.O_CLOEXEC))
    with out:
        other = client.front.set_device_state_fd(StateDirection.LOAD, out)
    assert other is None
    with open(into.release(), "wb") as file:
        file.write(state)
    client.front.check_device_state()


VSOCK = struct.Struct("<QQIIIHHIII")
STREAM = 1
CONNECT, RESPONSE, SHUTDOWN, DATA = 1, 2, 4, 5
HOST, GUEST = 2, 3
PORT = 5000


def test_vsock(programs, folder, via):
    """A connection from the first packet to the last, with data both ways."""
    host = folder / "host"
    sent = data(1, 3000)
    with (
        socket.socket(socket.AF_UNIX) as listener,
        vhost_device_vsock(programs, folder / "vsock.sock", host) as process,
        reach(via, folder / "vsock.sock", "--device-type=vsock") as front,
        Client(front, 2, protocol=ProtocolFeature.CONFIG) as client,
    ):
        listener.bind(f"{host}_{PORT}")
        listener.listen()
        assert struct.unpack("<Q", client.front.get_config(0, 8)) == (GUEST,)
        client.start()
        rx, tx = client.queues

        def send(op: int, payload: bytes = b"") -> None:
            fields = (GUEST, HOST, 1024, PORT, len(payload), STREAM, op, 0)
            packet = VSOCK.pack(*fields, 1 << 16, 0)
            client.request(tx.index, [packet, payload] if payload else [packet])

        def receive() -> tuple[int, bytes]:
            _, (header, payload) = rx.wait(posted.pop(0))
            _, _, port, to, length, _, op, _, _, _ = VSOCK.unpack(header)
            assert (port, to) == (PORT, 1024)
            return op, payload[:length]

        posted = [rx.offer([], [VSOCK.size, 4096]) for _ in range(8)]
        send(CONNECT)
        assert receive() == (RESPONSE, b"")
        connection, _ = listener.accept()
        with connection:
            send(DATA, sent)
            assert connection.recv(len(sent), socket.MSG_WAITALL) == sent
            connection.sendall(sent[::-1])
            received = b""
            while len(received) < len(sent):
                op, payload = receive()
                received += payload if op == DATA else b""
            assert received == sent[::-1]
        while receive()[0] != SHUTDOWN:
            pass
        check_isolation(client, process, via)
        client.stop()


NET_HEADER = 12
US = b"\2\0\0\0\0\1"
BROADCAST = b"\xff" * 6


def test_net_of_dpdk(programs, folder, via):
    """A frame that comes back, the announcement of a move, and an MTU."""
    frame = BROADCAST + US + b"\x88\xb5" + data(1, 500)
    protocol = ProtocolFeature.RARP | ProtocolFeature.NET_MTU
    with (
        Testpmd(programs, folder / "back.log", [vhost(folder / "net.sock")]) as process,
        reach(via, folder / "net.sock", "--device-type=net") as front,
        Client(front, 2, features=1 << 15, protocol=protocol) as client,
    ):
        client.front.net_set_mtu(1500)
        client.start()
        rx, tx = client.queues
        posted = [rx.offer([], [NET_HEADER, 2048]) for _ in range(4)]
        process("start")
        assert client.request(tx.index, [bytes(NET_HEADER), frame]) == (0, [])
        used, (_, found) = rx.wait(posted.pop(0))
        assert found[: used - NET_HEADER] == frame

        client.front.send_rarp(US)
        client.request(tx.index, [bytes(NET_HEADER), frame])
        frames = []
        for _ in range(2):
            used, (_, found) = rx.wait(posted.pop(0))
            frames.append(found[: used - NET_HEADER])
        (rarp,) = [found for found in frames if found != frame]
        assert rarp.startswith(BROADCAST + US + b"\x80\x35")
        check_isolation(client, process, via)
        process("stop")
        client.stop()
        assert rx.base == 3  # one buffer is handed back
        process.quit()


def test_net_of_passt(programs, folder, via):
    """passt answers who has the router's address."""
    request = BROADCAST + US + bytes.fromhex("0806 0001 0800 0604 0001")
    request += US + bytes([169, 254, 2, 1]) + bytes(6) + bytes([169, 254, 2, 2])
    with (
        closing(Network(programs, folder)) as network,
        passt(programs, network, folder / "net.sock") as process,
        reach(via, folder / "net.sock", "--device-type=net") as front,
        Client(front, 2, features=1 << 15) as client,
    ):
        client.start()
        rx, tx = client.queues
        posted = [rx.offer([], [4096]) for _ in range(8)]
        client.request(tx.index, [bytes(NET_HEADER) + request])
        reply = b""
        while reply[12:14] != b"\x08\x06":
            used, (found,) = rx.wait(posted.pop(0))
            reply = found[NET_HEADER:used]
        assert reply[20:22] == b"\0\2"
        assert reply[28:32] == bytes([169, 254, 2, 2])
        check_isolation(client, process, via)
        client.stop()
