# SPDX-License-Identifier: Apache-2.0
"""The units under a real systemd: started by a connection, hardened, restarted."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.real.processes import Process, listening
from tests.real.programs import Programs
from tests.real.systemd import BACK, Systemd, systemd
from tests.support.users import as_user
from vhost_airlock.cli.stats_document import ask
from vhost_airlock.errors import Disconnected
from vhost_airlock.peers.blk_process import BlkProcess
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.sandbox import files
from vhost_airlock.vhost.channel import Channel


@pytest.fixture(scope="module")
def the_manager() -> Iterator[Systemd]:
    with systemd() as running:
        yield running


@pytest.fixture
def manager(the_manager: Systemd, request: pytest.FixtureRequest) -> Iterator[Systemd]:
    """The one systemd of all tests; a test that fails quotes its journal."""
    yield the_manager
    print(the_manager.describe())


@contextmanager
def disk_back(manager: Systemd, programs: Programs, image: Path) -> Iterator[None]:
    """qemu-storage-daemon as a user of its own, as its own unit would start it."""
    folder = manager.run / "disk-back"
    folder.mkdir()
    for path in (folder, image):
        path.chmod(0o750)
        os.chown(path, BACK, BACK)
    socket_path = folder / "back.sock"
    own = replace(programs, prefix=(*programs.prefix, *as_user(BACK)))
    daemon = own(
        *("sh", "-c", 'umask 007; exec "$@"', "sh", "qemu-storage-daemon"),
        *("--blockdev", f"driver=file,node-name=disk,filename={image}"),
        "--export",
        "type=vhost-user-blk,id=export,node-name=disk,writable=on,"
        f"addr.type=unix,addr.path={socket_path}",
    )
    with Process(daemon, image.with_suffix(".log")) as process:
        process.wait_until(lambda: listening(socket_path))
        yield


@contextmanager
def disk_guest(manager: Systemd, name: str) -> Iterator[BlkGuest]:
    """A VMM that connects, and its guest: it writes, and reads the same again."""
    data = secrets.token_bytes(4096)
    with BlkGuest() as guest:
        guest.connect(connect(manager, name))
        guest.start()
        source, target = guest.ram.alloc(len(data)), guest.ram.alloc(len(data))
        guest.ram.view(source, len(data))[:] = data
        guest.write(8, [(source, len(data))])
        guest.read(8, [(target, len(data))])
        assert guest.ram.view(target, len(data)) == data
        yield guest


def connect(manager: Systemd, name: str) -> Channel:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(manager.run / "vhost-airlock" / f"{name}.sock"))
    return Channel(sock, peer="airlock", timeout=30)


def sockets_of(name: str) -> list[str]:
    """The socket units of an airlock."""
    return [f"vhost-airlock{kind}@{name}.socket" for kind in ("", "-stats", "-control")]


def start_sockets(manager: Systemd, name: str) -> list[str]:
    """Let systemd listen for an airlock's VMM, readers of stats, and its owner."""
    sockets = sockets_of(name)
    manager("systemctl", "start", *sockets)
    return sockets


def test_units_are_verified(manager: Systemd) -> None:
    service = manager.configure("verified", "--backend=/b")
    units = [service, *sockets_of("verified")]
    assert manager("systemd-analyze", "verify", *units) == ""
    told = manager("systemd-analyze", "security", "--no-pager", service)
    (exposure,) = re.findall(r"Overall exposure level .*: ([0-9.]+) ", told)
    assert float(exposure) < 2


def test_life_of_an_airlock(manager: Systemd, programs: Programs, folder: Path) -> None:
    """A connection starts it; it is restarted while a VMM comes back; it is stopped."""
    image = folder / "disk.img"
    image.write_bytes(bytes(1 << 20))
    folder.chmod(0o755)
    options = "--backend=/run/disk-back/back.sock --require-other-user --log-level=info"
    service = manager.configure("disk", options, "SupplementaryGroups=disk-back")
    sockets = start_sockets(manager, "disk")
    front = manager.run / "vhost-airlock" / "disk.sock"
    asked = ("stat", "--format=%U %G %a", "/run/vhost-airlock/disk.sock")
    assert manager(*asked) == "root kvm 660\n"
    assert manager.show(service, "ActiveState") == "inactive"
    with disk_back(manager, programs, image):
        with disk_guest(manager, "disk") as guest:
            assert manager.show(service, "ActiveState") == "active"
            assert manager.show(service, "StatusText") == "a VMM is connected"
            assert json.loads(ask(str(front.with_suffix(".stats"))))["vmm_connected"]
            assert_hardened(manager, service)
            manager("systemctl", "restart", "--no-block", service)
            with disk_guest(manager, "disk"), pytest.raises(Disconnected):
                guest.stop()
            assert front.is_socket()
        with disk_guest(manager, "disk"):
            manager("systemctl", "kill", "--kill-whom=main", "--signal=HUP", service)
            manager.await_value(service, "ActiveState", "inactive")
            assert manager.show(service, "Result") == "success"
        with disk_guest(manager, "disk"):
            manager("systemctl", "stop", *sockets, service)
        assert manager.show(service, "Result") == "success"
    assert [*front.parent.iterdir()] == []
    # A second VMM that waits while the first is still there would be a warning.
    journal = [line for line in manager.journal(service) if "VMM waits" not in line[1]]
    assert {priority for priority, _ in journal} == {6}, journal


def assert_hardened(manager: Systemd, service: str) -> None:
    """The airlock's process has a user of its own, no rights, and its sandbox."""
    (pid,) = manager("sh", "-c", f"systemctl show --value -p MainPID {service}").split()
    text = manager("cat", f"/proc/{pid}/status")
    status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    assert all(61184 <= int(uid) <= 65519 for uid in status["Uid"].split())
    for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert int(status["Seccomp_filters"]) > 1, "the unit's, and the airlock's own"


def test_back_end_that_fails(manager: Systemd, folder: Path) -> None:
    """The airlock ends as it is told, is started again, and serves the next VMM."""
    image, path = folder / "disk.img", manager.run / "fails.sock"
    image.write_bytes(bytes(1 << 16))
    service = manager.configure(
        "fails", "--backend=/run/fails.sock --on-backend-loss=exit"
    )
    sockets = start_sockets(manager, "fails")
    for restarts in ("0", "1"):
        with BlkProcess(str(image), str(path)) as back:
            path.chmod(0o666)
            with disk_guest(manager, "fails") as guest:
                assert manager.show(service, "NRestarts") == restarts
                back.process.kill()
                with pytest.raises(Disconnected):
                    guest.stop()
    manager("systemctl", "stop", *sockets, service)
    journal = manager.journal(service)
    ended = (3, "fails: the back-end is gone: ending (--on-backend-loss=exit)")
    assert journal.count(ended) == 2, journal


def test_back_end_is_swapped(manager: Systemd, folder: Path) -> None:
    """By root at the socket of its own unit, while a VMM is connected."""
    image, paths = folder / "disk.img", [manager.run / f"{i}.back" for i in range(2)]
    image.write_bytes(bytes(1 << 16))
    options = "--backend=/run/0.back --device-type=block"
    service = manager.configure("swapped", options)
    sockets = start_sockets(manager, "swapped")
    control = "/run/vhost-airlock/swapped.control"
    assert manager("stat", "--format=%U %a", control) == "root 600\n"
    with (
        BlkProcess(str(image), str(paths[0])) as old,
        BlkProcess(str(image), str(paths[1])),
    ):
        for path in paths:
            path.chmod(0o666)
        with disk_guest(manager, "swapped") as guest:
            told = manager("vhost-airlock", "swap", control, "--backend=/run/1.back")
            assert re.fullmatch(r"swapped; the guest's queues stood for .* s\n", told)
            old.process.kill()
            buffer = guest.ram.alloc(512)
            guest.read(8, [(buffer, 512)])
    manager("systemctl", "stop", *sockets, service)
    assert manager.show(service, "NRestarts") == "0"


def test_program_that_fails(manager: Systemd) -> None:
    """The airlock lives on, with a line in the journal for each VMM."""
    service = manager.configure("program", "-- false {fd}")
    start_sockets(manager, "program")
    with BlkGuest() as guest, pytest.raises(Disconnected):
        guest.connect(connect(manager, "program"))
    manager.await_value(service, "StatusText", "waiting for a VMM")
    journal = manager.journal(service)
    assert any("false" in line for priority, line in journal if priority <= 4), journal
    assert manager.show(service, "NRestarts") == "0"
    manager("systemctl", "stop", "vhost-airlock@program.socket", service)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ("seccomp", "seccomp ends the process by SIGSYS"),
        (
            "landlock_create_ruleset",
            "landlock_create_ruleset or landlock_restrict_self",
        ),
    ],
)
def test_filter_without_a_call_of_the_sandbox(
    manager: Systemd, call: str, named: str
) -> None:
    if call.startswith("landlock") and not files.version():
        pytest.skip("this kernel has no Landlock")
    name = call.partition("_")[0]
    settings = [f"SystemCallFilter=~{call}", "Restart=no"]
    service = manager.configure(name, "--backend=/run/none.sock", *settings)
    manager("systemctl", "start", service, status=1)
    assert manager.show(service, "ExecMainStatus") == "1"
    (line,) = [line for priority, line in manager.journal(service) if priority == 3]
    assert line.startswith(f"{name}: can't enter the sandbox: {named}")
    assert "SystemCallFilter= of systemd" in line
    assert "--sandbox=off" not in line
    manager("systemctl", "stop", f"vhost-airlock@{name}.socket")


def test_options_that_make_no_sense(manager: Systemd) -> None:
    """It is not started again and again: it would say the same."""
    service = manager.configure("wrong", "--backend=/run/none.sock --worker=2")
    listener, *_ = start_sockets(manager, "wrong")
    with closing(connect(manager, "wrong")):
        manager.await_value(listener, "Result", "trigger-limit-hit")
    assert manager.show(service, "ActiveState") == "failed"
    assert manager.show(service, "ExecMainStatus") == "2"
    told = [line for _, line in manager.journal(service)]
    assert len(told) == 5
    assert all("--worker=2" in line for line in told)
