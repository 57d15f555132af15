# SPDX-License-Identifier: Apache-2.0
"""A vhost-user block back-end over a file, as a program of its own.

    python -m vhost_airlock.peers.blk --socket-path=/tmp/blk.sock --blk-file=disk.img

It takes the options that the specification has for block back-ends, serves one
front-end after the other, and ends on SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import selectors
import signal
import socket
import sys
from collections.abc import Collection, Sequence
from types import FrameType

from ..errors import SessionError, StartError, Stopped
from ..process.sockets import Listener, inherited
from ..vhost.channel import Channel
from ..vhost.fds import Fd, HasFileno, eventfd, notify
from ..vhost.wire import Feature, ProtocolFeature
from .disk import Disk
from .server import Device, DeviceServer

log = logging.getLogger(__name__)

CAPABILITIES = {"type": "block", "features": ["blk-file", "read-only"]}
FEATURES: dict[str, Feature | ProtocolFeature] = {
    "event-idx": Feature.EVENT_IDX,
    "indirect": Feature.INDIRECT_DESC,
    "mem-slots": ProtocolFeature.CONFIGURE_MEM_SLOTS,
    "mq": ProtocolFeature.MQ,
    "reply-ack": ProtocolFeature.REPLY_ACK,
}


def serve(
    listener: socket.socket,
    device: Device,
    stop: HasFileno,
    without: Collection[Feature | ProtocolFeature] = (),
) -> None:
    """Serve all front-ends that connect, one after the other, until SIGTERM."""
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(stop.fileno(), selectors.EVENT_READ)
        while stop.fileno() not in {key.fd for key, _ in selector.select()}:
            serve_one(listener.accept()[0], device, stop, without)


def serve_one(
    connection: socket.socket,
    device: Device,
    stop: HasFileno,
    without: Collection[Feature | ProtocolFeature] = (),
) -> None:
    """Serve a connected front-end, until it's gone or SIGTERM comes."""
    with Channel(connection, stop=stop, peer="front") as channel:
        try:
            DeviceServer(channel, device, without=without, stop=stop).run()
        except SessionError as error:
            log.error("%s", error)
        except Stopped as error:
            log.debug("%s", error)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vhost_airlock.peers.blk",
        description="A vhost-user block back-end over a file.",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket-path", metavar="PATH", help="listen here")
    where.add_argument(
        "--fd", type=int, metavar="N", help="a listening or a connected socket"
    )
    where.add_argument(
        "--print-capabilities",
        action="store_true",
        help="print capabilities as JSON, and end",
    )
    parser.add_argument("--blk-file", metavar="FILE", help="the file to serve")
    parser.add_argument("--read-only", action="store_true", help="refuse writes")
    parser.add_argument("--num-queues", type=int, default=1, metavar="N")
    parser.add_argument(
        "--without",
        action="append",
        choices=FEATURES,
        default=[],
        help="do not offer a feature (can be repeated)",
    )
    args = parser.parse_args(argv)
    if not args.print_capabilities and args.blk_file is None:
        parser.error("--blk-file is missing")
    if not 1 <= args.num_queues <= 256:
        parser.error("--num-queues is 1 to 256")
    return args


def _run(args: argparse.Namespace, stop: Fd) -> None:
    try:
        disk = Disk.open(
            args.blk_file, read_only=args.read_only, num_queues=args.num_queues
        )
    except OSError as error:
        raise StartError(f"can't open {args.blk_file}: {error.strerror}") from None
    without = [FEATURES[name] for name in args.without]
    with disk:
        if args.socket_path is not None:
            with contextlib.closing(Listener(args.socket_path)) as listener:
                serve(listener.socket, disk, stop, without)
            return
        sock, listens = inherited(args.fd)
        with sock:
            if listens:
                serve(sock, disk, stop, without)
            else:
                serve_one(sock, disk, stop, without)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    args = _parse(argv)
    if args.print_capabilities:
        print(json.dumps(CAPABILITIES))
        return 0
    logging.basicConfig(format="blk: %(message)s")
    with eventfd() as stop:

        def on_signal(number: int, frame: FrameType | None) -> None:
            if not stop.closed:  # we may be ending already
                notify(stop)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)
        try:
            _run(args, stop)
        except StartError as error:
            print(f"blk: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
