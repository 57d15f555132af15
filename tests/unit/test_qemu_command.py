# SPDX-License-Identifier: Apache-2.0
"""`vhost-airlock qemu`: command lines with which QEMU is not started."""

import re
import socket
import sys
import tempfile

import pytest

from tests.support.tables import each_row
from vhost_airlock.cli import emulator, qemu
from vhost_airlock.cli import main as cli
from vhost_airlock.cli.qemu_plan import Plan

DISK = ["qemu", "-device", "vhost-user-blk-pci,chardev=c"]
THERE = [*DISK, "-chardev", "socket,id=c,path=/no/back.sock"]

UNUSABLE = [
    (2, [], "no command of QEMU .see vhost-airlock qemu --help"),
    (2, ["--workers=0", "--", *DISK], "--workers: 0: no number .*airlock qemu --help"),
    (
        2,
        ["--nonsense", "--", *DISK],
        "arguments: --nonsense .see vhost-airlock qemu --h",
    ),
    (2, ["surplus", "--", *DISK], "arguments: surplus .see vhost-airlock qemu --help"),
    (2, ["--backend=x", "--", *DISK], "--backend can't be the same for all"),
    (2, ["--fd=0", "--", *DISK], "--fd can't be the same for all airlocks .see"),
    (2, ["--backend-fd=3", "--", *DISK], "--backend-fd can't be the same for all"),
    (2, ["--name=x", "--", *DISK], "--name can't be the same for all airlocks .see"),
    (2, ["--stats-path=x", "--", *DISK], "--stats-path can't be the same for all"),
    (2, ["--exit-with-pipe=3", "--", *DISK], "--exit-with-pipe can't be the same"),
    (2, ["--print-capabilities", "--", *DISK], "--print-capabilities can't be the sam"),
    (2, ["--socket-mode=9", "--", *DISK], "--socket-mode: 9"),
    (2, ["--stats", "x", "--", *DISK], "unrecognized arguments: --stats x"),
    (1, ["--device-type=gpu", "--", *DISK], "a gpu device can't be isolated"),
    (1, ["--stats-dir=/no", "--", *DISK], "--stats-dir /no: it is no folder"),
    (1, ["--control-dir=/no", "--", *DISK], "--control-dir /no: it is no folder"),
    (2, ["--control-path=x", "--", *DISK], "--control-path can't be the same for all"),
    (1, ["--", *THERE], "no back-end at /no/back.sock: No such file"),
    (1, ["--", *DISK, "-chardev", "socket,id=c,fd=999"], "descriptor 999: Bad file de"),
    (1, ["--", *DISK[:2], f"{DISK[2]},memory-isolation=on"], "no -chardev with id=c"),
    (2, ["--", *DISK[:2], "{'driver': 'x'}"], "-device .*can't be read as JSON"),
]


@each_row(UNUSABLE)
def test_command_that_does_not_start_qemu_is_told_in_one_line(
    status, arguments, text, *, capsys
):
    assert cli.main(["qemu", *arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.match(f"vhost-airlock: .*{text}", err), err


@pytest.mark.parametrize("server", ["on", "off"])
def test_inherited_socket_is_of_the_kind_that_is_told(server, capsys, tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        with socket.socket(socket.AF_UNIX) as connected:
            connected.connect(str(tmp_path / "sock"))
            number = (connected if server == "on" else listener).fileno()
            words = [*DISK, "-chardev", f"socket,id=c,fd={number},server={server}"]
            assert cli.main(["qemu", "--", *words]) == 1
    trouble = "does not listen" if server == "on" else "listens"
    assert capsys.readouterr().err == (
        f"vhost-airlock: -chardev c,server={server}: descriptor {number} {trouble}\n"
    )


WAYS = [
    (DISK[2], "b.sock", ["--name=c", "--device-type=block", "--no-wait"]),
    (DISK[2], "b,reconnect-ms=5", ["--name=c", "--device-type=block"]),
    (DISK[2], "x,fd=5", ["--name=c", "--device-type=block"]),
    (DISK[2], "x,fd=5,server=on", ["--name=c", "--device-type=block"]),
    (DISK[2], "b,server=on", ["--name=c", "--device-type=block", "--socket-mode=660"]),
    ("vhost-user-rtc-pci,chardev=c", "b,reconnect=1", ["--name=c"]),
]


@each_row(WAYS)
def test_options_of_an_airlock(device, path, words):
    """QEMU that does not try again, does not wait for a back-end either."""
    command = ["qemu", "-device", device, "-chardev", f"socket,id=c,path={path}"]
    (isolated,) = Plan(command).isolated
    options = cli.parse(["qemu", "--socket-mode=660", "--", *command])
    assert qemu.options_of(isolated, options) == words


def test_log_that_can_not_be_written(capsys, tmp_path):
    words = [*DISK, "-chardev", f"socket,id=c,path={tmp_path}/b,server=on"]
    assert cli.main(["qemu", f"--log-file={tmp_path}/no/log", "--", *words]) == 1
    assert f"can't write to {tmp_path}/no/log: No such file" in capsys.readouterr().err


def test_folder_that_can_not_be_made(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", f"{tmp_path}/no")
    words = [*DISK, "-chardev", f"socket,id=c,path={tmp_path}/b,server=on"]
    assert cli.main(["qemu", "--", *words]) == 1
    said = "vhost-airlock: can't start airlocks: No such file or directory\n"
    assert capsys.readouterr().err.endswith(said)


def test_emulator_has_the_name_of_a_qemu(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/qemu-airlock", "-S"])
    assert emulator.emulator() == 2
    assert capsys.readouterr().err == (
        "qemu-airlock: the name does not begin with vhost-airlock-\n"
    )


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["qemu", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for option in ("--stats-dir", "--control-dir", "--log-file", *qemu.RIGHTS):
        assert option in said
