# SPDX-License-Identifier: Apache-2.0
"""The log of sessions, good ones and bad ones, line by line."""

from __future__ import annotations

import os
import re
import socket
import threading
from pathlib import Path

import pytest

from tests.support.backs import PATIENCE, DiskBack, ScriptedBack, readable, wait_until
from tests.support.program import LINE, Program, connect, listening
from tests.support.sessions import serve, small_guest
from vhost_airlock.errors import AirlockError
from vhost_airlock.peers.disk import SECTOR
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.frontend import Frontend

WE = f"process {os.getpid()}, user {os.getuid()}"
INFO = "--log-level=info"


def ways(front: Path, where: Path) -> list[str]:
    return [f"--socket-path={front}", f"--backend={where}"]


def assert_log(program: Program, *expected: tuple[str, str]) -> None:
    """These are its lines, by level and regular expression."""
    lines = program.errors().splitlines()
    assert len(lines) == len(expected), lines
    for line, (level, text) in zip(lines, expected, strict=True):
        assert re.fullmatch(f"{LINE}: {level}: {text}", line), line


def test_good_session(front: Path, tmp_path: Path) -> None:
    with (
        listening(DiskBack(num_queues=2), tmp_path / "back.sock") as where,
        Program(*ways(front, where), INFO) as program,
    ):
        with BlkGuest(num_queues=2, queue_size=64) as guest:
            guest.connect(program.connect(front))
            guest.start()
            buffer = guest.ram.alloc(8 * SECTOR)
            for _ in range(3):
                guest.write(0, [(buffer, 8 * SECTOR)])
            guest.read(0, [(buffer, 8 * SECTOR)])
            guest.stop()
        wait_until(lambda: "session ended" in program.errors(), "it has ended")
        assert program.stop() == 0
        assert_log(
            program,
            ("info", f"listening for the VMM at {front}"),
            ("info", f"back-end connected: {WE}"),
            ("info", f"VMM connected: {WE}"),
            (
                "info",
                "features agreed with the VMM: INDIRECT_DESC EVENT_IDX"
                " PROTOCOL_FEATURES VERSION_1 0x[0-9a-f]+;"
                " protocol features: .*MQ.* CONFIGURE_MEM_SLOTS.*",
            ),
            (
                "info",
                "features agreed with the back-end: .* VERSION_1 .*; .* REPLY_ACK.*",
            ),
            ("info", "ring 0 started: 64 entries, base 0"),
            ("info", "ring 1 started: 64 entries, base 0"),
            ("info", "ring 0 stopped: base 4"),
            ("info", "ring 1 stopped: base 0"),
            (
                "info",
                r"session ended after \d+\.\d s: VMM: closed the connection;"
                r" 4 requests, 12 KiB to the back-end, 4 KiB from it,"
                r" rings broke 0 times",
            ),
            ("info", "SIGTERM: the airlock ends"),
        )


def test_a_guest_that_resets_its_device_again_and_again_can_not_fill_the_log(
    front: Path, tmp_path: Path
) -> None:
    with (
        listening(DiskBack(), tmp_path / "back.sock") as where,
        Program(*ways(front, where), INFO) as program,
        BlkGuest() as guest,
    ):
        guest.connect(program.connect(front))
        for _ in range(40):
            guest.start()
            guest.stop()
        assert program.stop() == 0
        lines = program.errors().splitlines()
    assert len(lines) < 40
    assert sum("started" in line or "stopped" in line for line in lines) == 8


def test_second_vmm_is_told_once(front: Path, where: Path, back: ScriptedBack) -> None:
    """At the default level: it may stand still for as long as the first one runs."""
    with Program(*ways(front, where)) as program, small_guest() as guest:
        guest.connect(program.connect(front))
        guest.start()
        with connect(front, program):
            wait_until(lambda: "another VMM" in program.errors(), "it is told")
            serve(back, guest)
        serve(back, guest)
        with connect(front, program):
            serve(back, guest)
        assert program.stop() == 0
        assert_log(
            program,
            (
                "warning",
                r"another VMM waits: one is served at a time, and the VMM that is"
                rf" \({WE}\) has to leave first",
            ),
        )


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
            (
                "error",
                r"VMM: does not speak vhost-user: it begins with b'GET / HTTP/1'",
            ),
        ),
        (b"{}\n", ("info", "VMM: closed the connection in the middle of a message")),
        (b"", ("info", "VMM: closed the connection before its first message")),
    ],
    ids=["http", "little", "nothing"],
)
def test_client_that_is_no_vmm(
    front: Path, where: Path, sent: bytes, told: tuple[str, str]
) -> None:
    level, text = told
    with Program(*ways(front, where), INFO) as program:
        with connect(front, program) as client:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            assert readable(client), "it hangs up"
        wait_until(lambda: "session ended" in program.errors(), "it has ended")
        assert program.stop() == 0
        assert re.search(f"^{LINE}: {level}: .*{text}", program.errors(), re.M)


def other_service(listener: socket.socket, answer: bytes) -> None:
    """Serve one client, as another protocol's server."""
    with listener.accept()[0] as sock:
        assert sock.recv(4096)
        sock.sendall(answer)
        assert readable(sock), "the airlock hangs up"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            r"back-end: does not speak vhost-user: it begins with b'HTTP/1\.1 400'"
            r" \(flags 0x312e312f\)",
        ),
        (
            b"",
            r"back-end: did not answer in time \(GET_FEATURES\): is it a vhost-user"
            r" back-end, and free to serve\?",
        ),
    ],
    ids=["http", "silent"],
)
def test_socket_of_another_service_is_no_back_end(
    front: Path, tmp_path: Path, answer: bytes, text: str
) -> None:
    where = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(where))
        listener.listen()
        listener.settimeout(PATIENCE)
        thread = threading.Thread(target=other_service, args=[listener, answer])
        thread.start()
        with Program(*ways(front, where), "--timeout=0.2") as program:
            with (
                Frontend(program.connect(front), timeout=PATIENCE) as vmm,
                pytest.raises(AirlockError),
            ):
                vmm.get_features()
            assert program.stop() == 0
            assert_log(program, ("error", text))
        thread.join()


@pytest.mark.parametrize(
    ("has", "lacks"), [("{fd}", "{listen-fd}"), ("{listen-fd}", "{fd}")]
)
def test_program_that_does_not_say_a_word_may_want_the_other_descriptor(
    front: Path, has: str, lacks: str
) -> None:
    """It may end well, as passt does when it gets a listening socket."""
    command = ["sh", "-c", "exit 0", has]
    with Program(f"--socket-path={front}", "--", *command) as program:
        with (
            Frontend(program.connect(front), timeout=PATIENCE) as vmm,
            pytest.raises(AirlockError),
        ):
            vmm.get_features()
        wait_until(lambda: "does it take" in program.errors(), "it is told")
        assert program.stop() == 0
        assert_log(
            program,
            ("error", "back-end: closed the connection before its first message"),
            (
                "warning",
                r"back-end: sh \(process \d+\) ended: status 0, and sent no message:"
                f" does it take {lacks} in place of {has}\\?",
            ),
        )


def test_inherited_socket_has_its_own_name(tmp_path: Path, where: Path) -> None:
    """As under systemd, which passes a socket for each instance of a unit."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "front.sock"))
        listener.listen()
        number = listener.fileno()
        ways = [f"--fd={number}", f"--backend={where}", INFO]
        with Program(*ways, pass_fds=[number]) as program:
            channel = Channel(connect(tmp_path / "front.sock", program), peer="airlock")
            with Frontend(channel, timeout=PATIENCE) as vmm:
                vmm.get_features()
            assert program.stop() == 0
            assert (
                f"{LINE}: info: listening for the VMM at {tmp_path}" in program.errors()
            )
