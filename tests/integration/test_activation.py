# SPDX-License-Identifier: Apache-2.0
"""An airlock that a service manager starts: with its sockets, and with news for it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.backs import PATIENCE, ScriptedBack
from tests.support.program import COMMAND, Program
from tests.support.sessions import serve, small_guest
from vhost_airlock.cli.stats_document import ask
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.vhost.channel import Channel

BLK = (sys.executable, "-m", "vhost_airlock.peers.blk")

AS_A_MANAGER = """
import os, sys
names, numbers, *command = sys.argv[1:]
for number, place in zip(map(int, numbers.split()), range(100, 200)):
    os.dup2(number, place)  # out of the way of each other
for place in range(len(numbers.split())):
    os.dup2(100 + place, 3 + place)
os.closerange(3 + len(numbers.split()), 300)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(numbers.split()))}
os.environ |= {"LISTEN_FDNAMES": names}
os.execv(command[0], command)
"""
"""Passes sockets as sd_listen_fds(3) says, from within the new process."""


def passed(
    sockets: Mapping[str, socket.socket], *arguments: str, variables: Sequence[str] = ()
) -> Program:
    """An airlock that gets sockets with these names."""
    numbers = [sock.fileno() for sock in sockets.values()]
    start = ["/usr/bin/env", *variables, sys.executable, "-c", AS_A_MANAGER]
    start += [":".join(sockets), " ".join(map(str, numbers))]
    return Program(*arguments, pass_fds=numbers, command=[*start, *COMMAND])


def listening(path: Path, stack: ExitStack) -> socket.socket:
    kind = socket.SOCK_SEQPACKET if path.name == "stats" else socket.SOCK_STREAM
    sock = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
    sock.bind(str(path))
    sock.listen()
    return sock


def connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    sock.connect(str(path))
    return sock


def test_all_sides_have_sockets_of_the_manager(
    tmp_path: Path, back: ScriptedBack
) -> None:
    """Two back-ends and three VMMs come, and the sockets stay when the airlock ends."""
    paths = {name: tmp_path / name for name in ("stats", "front", "back")}
    with ExitStack() as stack:
        sockets = {name: listening(path, stack) for name, path in paths.items()}
        for turn in (1, 2):
            with passed(sockets) as program:
                back.start(connected(paths["back"]))
                with small_guest() as guest:
                    guest.connect(Channel(connected(paths["front"]), peer="airlock"))
                    guest.start()
                    serve(back, guest)
                    told = json.loads(ask(str(paths["stats"])))
                    assert told["vmm_connected"], turn
                assert program.stop() == 0, turn
                assert program.errors() == "", turn
            assert all(path.is_socket() for path in paths.values()), turn
        connected(paths["front"]).close()  # it waits for the next airlock
    back.close()


def test_connection_that_waits_is_served_when_the_airlock_comes(
    tmp_path: Path, back: ScriptedBack, where: Path
) -> None:
    with ExitStack() as stack, small_guest() as guest:
        front = listening(tmp_path / "front", stack)
        early = Channel(connected(tmp_path / "front"), peer="airlock")
        with passed({"any.socket": front}, f"--backend={where}") as program:
            guest.connect(early)
            guest.start()
            serve(back, guest)
            assert program.stop() == 0


def test_variables_do_not_reach_a_back_end(tmp_path: Path) -> None:
    """Nor do the sockets."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    seen = tmp_path / "seen"
    script = f'env > {seen}; ls -l /proc/self/fd >> {seen}; exec "$@"'
    command = ["/bin/sh", "-c", script, "sh", *BLK, "--fd={fd}", f"--blk-file={image}"]
    notify = tmp_path / "notify"
    with ExitStack() as stack, BlkGuest() as guest:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        listener.bind(str(notify))
        front = listening(tmp_path / "front", stack)
        numbers = [os.fstat(sock.fileno()).st_ino for sock in (front, listener)]
        with passed(
            {"front": front},
            *("--", *command),
            variables=[f"NOTIFY_SOCKET={notify}", "LISTEN_PIDFDID=7"],
        ) as program:
            guest.connect(Channel(connected(tmp_path / "front"), peer="airlock"))
            guest.start()
            guest.read(0, [(guest.ram.alloc(512), 512)])
            assert program.stop() == 0
    text = seen.read_text()
    assert re.search(r"^PATH=", text, re.M)
    assert not re.search(r"^(LISTEN_|NOTIFY_)", text, re.M)
    assert not any(f"socket:[{number}]" in text for number in numbers)


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_manager_is_told_of_the_airlocks_life(
    tmp_path: Path, back: ScriptedBack, where: Path, kind: str
) -> None:
    """Also from within the sandbox: the connection is older than that."""
    address = str(tmp_path / "notify") if kind == "path" else f"@{tmp_path}"
    front = tmp_path / "front"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address.replace("@", "\0"))
        listener.settimeout(PATIENCE)
        ways = [f"--socket-path={front}", f"--backend={where}"]
        start = ["/usr/bin/env", f"NOTIFY_SOCKET={address}", *COMMAND]
        with Program(*ways, command=start) as program, small_guest() as guest:
            assert listener.recv(99) == b"READY=1"
            assert listener.recv(99) == b"STATUS=waiting for a VMM"
            guest.connect(Channel(connected(front), peer="airlock"))
            assert listener.recv(99) == b"STATUS=a VMM waits for the back-end"
            assert listener.recv(99) == b"STATUS=a VMM is connected"
            guest.start()
            serve(back, guest)
            program.process.send_signal(signal.SIGTERM)
            assert listener.recv(99) == b"STOPPING=1\nSTATUS=ending"
            assert program.wait() == 0
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.recv(99)


@pytest.mark.parametrize(
    ("names", "arguments", "text"),
    [
        (["front"], ["--socket-path=F"], "--socket-path: the service manager passes"),
        (["front"], ["--fd=3"], "--fd: the service manager passes a socket for this"),
        (["back"], ["--backend=B"], r"--backend: .* for this side \(back\)"),
        (["stats"], ["--stats-path=S"], r"--stats-path: .* for this side \(stats\)"),
        (["front"], [], "one of --backend, .*, -- COMMAND is needed"),
        (["back"], [], "one of --socket-path, --fd, --front-connect is needed"),
        (
            ["front", "disk"],
            [],
            r"the service manager passes two sockets for one side \(front\)",
        ),
    ],
    ids=str,
)
def test_conflict_with_an_option_is_told(
    tmp_path: Path, names: list[str], arguments: list[str], text: str
) -> None:
    with ExitStack() as stack:
        sockets = {name: listening(tmp_path / name, stack) for name in names}
        with passed(sockets, *arguments) as program:
            assert program.wait() == (1 if "two sockets" in text else 2)
            told = program.errors()
    assert re.search(f"^vhost-airlock: {text}.*\n$", told), told


def test_socket_that_does_not_listen_is_named(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with ours, theirs, ExitStack() as stack:
        sockets = {"front": listening(tmp_path / "front", stack), "stats": ours}
        with passed(sockets, f"--backend={tmp_path}/front") as program:
            assert program.wait() == 1
            assert "descriptor 4 does not listen" in program.errors()


def test_stream_is_no_socket_for_stats(tmp_path: Path) -> None:
    with ExitStack() as stack:
        sockets = {name: listening(tmp_path / name, stack) for name in ("front", "x")}
        renamed = {"front": sockets["front"], "stats": sockets["x"]}
        with passed(renamed, f"--backend={tmp_path}/front") as program:
            assert program.wait() == 1
            assert program.errors() == (
                "vhost-airlock front: error: descriptor 4 is no unix sequential-packet"
                " socket\n"
            )
