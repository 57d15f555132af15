# SPDX-License-Identifier: Apache-2.0
"""The control socket: commands of the airlock's owner, served by the broker.

A command is one packet with one line of JSON, and so is its answer:

    {"do": "stats"}                           the state of the airlock
    {"do": "swap", "backend": "/path"}        another back-end takes the place of the
    {"do": "swap", "command": ["a", ...]}     one that is there

    {"result": "text"}   or   {"error": "reason"}

The broker serves it, since it still has the user's rights: it is the one to connect to
a back-end or to start it, and the process with the guest's memory shall not be able to
tell it which one. That process gets the order to swap, with the target for its log; the
target itself stays here, and is the broker's only after that process adopts it.

A peer that hangs up its side for writing without a command asks for stats, so a reader
of stats need not know if a socket is this one or that of --stats-path. Its socket is
handed to the thread that serves those (stats_server.py).

No peer is waited for: it has one packet, and READ_TIME to send it. It has to be of the
airlock's user, or root, whatever the mode of the socket is.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
from typing import Any

from ..errors import AirlockError, UsageError
from ..record import changeable
from .reach import Reach
from .sockets import peer_of, reason_of
from .target import Target

KIND = socket.SOCK_SEQPACKET
"""Of the socket: a VMM that connects here by mistake is refused by the kernel."""
LARGEST = 64 << 10
"""Bytes of a command."""
READ_TIME = 1.0
"""Seconds that a peer has to send its command."""
MOST_PEERS = 16
"""Peers that may be about to send their command at the same time."""
DONE, FAILED = b"+", b"-"
"""The first byte of the airlock's answer to an order; a text follows."""


@changeable
class _Peer:
    sock: socket.socket
    until: float
    """When it has to have sent its command."""


class Control:
    """Serves the control socket. It owns all three sockets.

    `orders` is a pair's end, to the airlock's main thread, `readers` to its thread for
    stats.
    """

    def __init__(
        self, listener: socket.socket, orders: socket.socket, readers: socket.socket
    ) -> None:
        self._listener = listener
        self._orders = orders
        self._readers = readers
        self._users = {0, os.geteuid()}
        self._peers: dict[int, _Peer] = {}
        self._asking: socket.socket | None = None
        """The peer whose order is under way."""
        self.next: Reach | None = None
        """The back-end of that order, until it is adopted."""
        self._ended = False
        """Does the airlock answer no more orders?"""
        for sock in (listener, orders, readers):
            sock.setblocking(False)
        # Few readers wait there: the least size that the kernel allows.
        readers.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)

    def register(self, poll: select.poll) -> None:
        """Register all that look() wants to know of."""
        if not self._ended:
            poll.register(self._orders, select.POLLIN)
        if len(self._peers) < MOST_PEERS:
            poll.register(self._listener, select.POLLIN)
        for fd in self._peers:
            poll.register(fd, select.POLLIN)

    def wait(self) -> float | None:
        """Seconds until a peer has had its time; None: there is none."""
        until = min((peer.until for peer in self._peers.values()), default=None)
        return None if until is None else max(0.0, until - time.monotonic())

    def look(self, ready: set[int]) -> None:
        """Serve the descriptors that are ready."""
        if self._orders.fileno() in ready:
            self._pass_answer()
        for fd in ready & self._peers.keys():
            self._serve(self._peers.pop(fd).sock)
        now = time.monotonic()
        for fd, peer in list(self._peers.items()):
            if peer.until <= now:
                del self._peers[fd]
                _answer(peer.sock, error=f"no command came in {READ_TIME:g} s")
        if self._listener.fileno() in ready:
            self._accept()

    def adopt(self) -> Reach:
        """Return the next back-end, which is the airlock's own from now on. OSError if
        there is no order under way.
        """
        adopted, self.next = self.next, None
        if adopted is None:
            raise OSError("this is nothing that the broker does")
        return adopted

    def close(self) -> None:
        """End the next back-end, and hang up on the peers."""
        self._drop()
        for peer in self._peers.values():
            peer.sock.close()
        if self._asking is not None:
            self._asking.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # it is gone, or there is no descriptor left for it
        sock.setblocking(False)
        uid = peer_of(sock).uid
        if uid not in self._users:
            _answer(sock, error=f"user {uid} may not: only the airlock's own user may")
            return
        self._peers[sock.fileno()] = _Peer(sock, time.monotonic() + READ_TIME)

    def _serve(self, sock: socket.socket) -> None:
        """Carry out a peer's command, and answer it, or have it answered later."""
        try:
            told = _receive(sock)
            deed = told.get("do")
            if deed == "stats":
                self._hand_over(sock)
            elif deed == "swap":
                self._order(sock, Target.parse(told))
            else:
                raise UsageError(f"there is no command {deed!a:.100}")
        except OSError as error:
            _answer(sock, error=reason_of(error))
        except AirlockError as error:
            _answer(sock, error=str(error))

    def _hand_over(self, sock: socket.socket) -> None:
        """Let the thread for stats answer a peer."""
        socket.send_fds(self._readers, [b"stats"], [sock.fileno()])
        sock.close()

    def _order(self, sock: socket.socket, target: Target) -> None:
        """Order the airlock to take another back-end; its answer comes later."""
        if self._asking is not None:
            raise UsageError("another swap is under way")
        target.require_there()
        self._asking, self.next = sock, Reach(target)
        try:
            self._orders.send(json.dumps(target.told()).encode(), socket.MSG_NOSIGNAL)
        except OSError:
            self._asking = None
            self._drop()
            raise

    def _pass_answer(self) -> None:
        """Pass the airlock's answer on to the peer, and drop what was not adopted."""
        with contextlib.suppress(OSError):
            said = self._orders.recv(LARGEST)
            self._ended = not said
            peer, self._asking = self._asking, None
            self._drop()
            if peer is not None:
                kind = "result" if said[:1] == DONE else "error"
                _answer(peer, **{kind: said[1:].decode(errors="replace")})

    def _drop(self) -> None:
        dropped, self.next = self.next, None
        if dropped is not None:
            dropped.close()


def _receive(sock: socket.socket) -> dict[str, Any]:
    """Return the command that a peer has sent. UsageError if that is none."""
    data, _, flags, _ = sock.recvmsg(LARGEST)
    if not data:
        return {"do": "stats"}
    if flags & socket.MSG_TRUNC:
        raise UsageError(f"a command has at most {LARGEST} bytes")
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise UsageError("a command is a line with a JSON object")
    return told


def _answer(sock: socket.socket, **answer: str) -> None:
    """Answer a peer that may be gone, and hang up."""
    with sock, contextlib.suppress(OSError):
        sock.send(json.dumps(answer).encode() + b"\n", socket.MSG_NOSIGNAL)
