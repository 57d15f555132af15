# SPDX-License-Identifier: Apache-2.0
"""A connection over which questions and answers go one at a time."""

import socket

PATIENCE = 100
SIZE = 6

_sockets: list[socket.socket] = []


def begin(host: str, port: int) -> None:
    sock = socket.socket()
    sock.settimeout(PATIENCE)
    sock.connect((host, port))
    _sockets.append(sock)


def ask(question: str) -> str:
    """Say SIZE letters, and return the SIZE letters of the answer."""
    sock = _sockets[-1]
    sock.sendall(question.encode())
    answer = b""
    while len(answer) < SIZE:
        piece = sock.recv(SIZE - len(answer))
        if not piece:
            raise EOFError("the connection has ended")
        answer += piece
    return answer.decode()
