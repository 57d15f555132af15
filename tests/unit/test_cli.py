# SPDX-License-Identifier: Apache-2.0
"""Arguments: what they become, and what is said of those that make no sense."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.support.tables import each_row
from vhost_airlock import __version__
from vhost_airlock.cli import main as cli
from vhost_airlock.cli import run
from vhost_airlock.dataplane.pump import POLICIES
from vhost_airlock.process.config import ProcessConfig
from vhost_airlock.process.sockets import Group, Rights
from vhost_airlock.proxy.caches import cached_bytes
from vhost_airlock.proxy.config import MIB, Config
from vhost_airlock.proxy.device_types import TYPES, DeviceType
from vhost_airlock.proxy.features import Withheld
from vhost_airlock.record import fields, replaced
from vhost_airlock.vhost.wire import Feature

WAYS = ["--socket-path=/front", "--backend=/back"]


class Recorded:
    """Stands in for the daemon: keeps what it is made of."""

    configs: list[ProcessConfig]

    def __init__(self, config: ProcessConfig) -> None:
        Recorded.configs.append(config)

    def run(self) -> int:
        return 7


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[ProcessConfig]:
    Recorded.configs = []
    monkeypatch.setattr(run, "Daemon", Recorded)
    monkeypatch.setattr(run, "log_to_stderr", lambda *_: None)
    return Recorded.configs


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))


def config_of(configs: list[ProcessConfig], *arguments: str) -> ProcessConfig:
    assert cli.main(["run", *arguments]) == 7, "the daemon's status is the program's"
    return configs[-1]


def test_defaults_are_those_of_config(configs: list[ProcessConfig]) -> None:
    config = config_of(configs, *WAYS)
    device = Config(name="front")
    assert config == ProcessConfig(socket_path="/front", backend="/back", device=device)


RECOVERS = {"recover": True, "has_error": True}

OPTIONS: list[tuple[list[str], dict[str, Any]]] = [
    (["--keep-backend"], {"keep_backend": True}),
    (["--on-backend-loss=exit"], {"exit_with_backend": True}),
    (["--on-backend-loss", "recover"], {"recover": True}),
    (["--on-backend-loss=close"], {}),
    (
        ["--on-backend-loss=recover", "--device-type=scsi"],
        {"recover": True, "whole_batches": 0},
    ),
    (["--recover-for=0.5"], {"recover_time": 0.5}),
    (["--recover-times=9"], {"recover_times": 9}),
    (["--fence=exit"], {"fence": "exit"}),
    (["--wait-for=2"], {"wait_for": 2.0}),
    (["--exit-with-pipe=7"], {"exit_with_pipe": 7}),
    (["--once"], {"once": True}),
    (["--sandbox=off"], {"sandbox": False}),
    (
        ["--withhold-features=EVENT_IDX,0x40"],
        {"withhold_features": Withheld(Feature.EVENT_IDX | 0x40)},
    ),
    (["--sandbox=on"], {"sandbox": True}),
    (["--copy=used"], {"copy": "used"}),
    (["--copy", "used+tail"], {"copy": "used+tail"}),
    (["--pool-limit=4096"], {"pool_limit": 4096}),
    (["--pool-limit=4K"], {"pool_limit": 4096}),
    (["--pool-limit=64M"], {"pool_limit": 64 * MIB}),
    (["--pool-limit=64MiB"], {"pool_limit": 64 * MIB}),
    (["--pool-limit=1g"], {"pool_limit": 1024 * MIB}),
    (["--pool-limit=4G"], {"pool_limit": 4096 * MIB}),
    (["--cached=0"], {"cached": 0}),
    (["--cached=16M"], {"cached": 16 * MIB}),
    (["--request-limit=0"], {"request_limit": 0}),
    (["--request-limit=4G"], {"request_limit": 4096 * MIB}),
    (["--poll-us=0"], {"poll_us": 0}),
    (["--poll-us=1000000"], {"poll_us": 1_000_000}),
    (["--workers=64"], {"workers": 64}),
    (["--worker-cpus=0"], {"worker_cpus": (0,)}),
    (["--worker-cpus=5,1-3,0"], {"worker_cpus": (5, 1, 2, 3, 0)}),
    (["--timeout=0.5"], {"timeout": 0.5}),
    (["--drain-timeout=3600"], {"drain_timeout": 3600.0}),
    (["--socket-mode=0660"], {"socket_mode": 0o660}),
    (["--socket-mode=777"], {"socket_mode": 0o777}),
    (["--socket-group=root"], {"socket_group": Group("root", 0)}),
    (["--socket-group=1234567"], {"socket_group": Group("1234567", 1234567)}),
    (["--log-level=debug"], {"log_level": "debug"}),
    (["--name=vm 1: disk"], {"name": "vm 1: disk"}),
    (["--device-type=net"], {"copy": "used", **RECOVERS}),
    (["--device-type=1"], {"copy": "used", **RECOVERS}),
    (["--device-type=net", "--copy=full"], {"copy": "full", **RECOVERS}),
    (["--device-type=block"], {"whole_batches": 0, "grows": True, **RECOVERS}),
    (
        ["--device-type=block", "--on-backend-loss=close"],
        {"whole_batches": 0, "grows": True, "has_error": True},
    ),
    (
        ["--device-type=fs"],
        {"whole_batches": 0, "stateful": "open files and locks"},
    ),
]


@pytest.mark.parametrize(("arguments", "changes"), OPTIONS, ids=str)
def test_option(
    configs: list[ProcessConfig], arguments: list[str], changes: dict[str, Any]
) -> None:
    plain = ProcessConfig(socket_path="/front", backend="/back")
    of_device = {*fields(Config)} & {*changes}
    chosen = {name: changes.pop(name) for name in of_device}
    device = Config(**{"name": "front", "cached": cached_bytes(), **chosen})
    expected = replaced(plain, device=device, **changes)
    assert config_of(configs, *WAYS, *arguments) == expected


def test_group_may_connect_when_one_is_given() -> None:
    group = Group("kvm", 99)
    assert ProcessConfig().rights == Rights(0o600)
    assert ProcessConfig(socket_group=group).rights == Rights(0o660, group)
    assert ProcessConfig(socket_mode=0o640).rights == Rights(0o640)
    assert ProcessConfig(socket_mode=0, socket_group=group).rights == Rights(0, group)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--fd=5", "--backend=/b"], ProcessConfig(fd=5, backend="/b")),
        (["--fd=0", "--backend-listen=/b"], ProcessConfig(fd=0, backend_listen="/b")),
        (["--fd=5", "--backend-fd=6"], ProcessConfig(fd=5, backend_fd=6)),
        (["--front-connect=/f", "--backend=/b"], ProcessConfig(None, None, "/f", "/b")),
        (
            ["--socket-path=/f", "--", "back", "--fd={fd}", "--", "x"],
            ProcessConfig(socket_path="/f", command=("back", "--fd={fd}", "--", "x")),
        ),
    ],
    ids=str,
)
def test_ways_to_the_front_and_the_back(
    configs: list[ProcessConfig], arguments: list[str], expected: ProcessConfig
) -> None:
    config = config_of(configs, *arguments)
    assert replaced(config, device=Config()) == expected


@pytest.mark.parametrize(
    ("front", "name"),
    [
        ("--socket-path=/run/vm/disk.sock", "disk.sock"),
        ("--socket-path=disk.sock", "disk.sock"),
        ("--front-connect=./vm.sock", "vm.sock"),
        ("--fd=3", "fd 3"),
        ("--socket-path=/run/disk\n<3>\udcff.sock", "disk?<3>?.sock"),
        (f"--socket-path={'d' * 90}", "d" * 64),
    ],
)
def test_device_is_named_after_the_front_s_socket(
    configs: list[ProcessConfig], front: str, name: str
) -> None:
    assert config_of(configs, front, "--backend=/back").device.name == name


UNUSABLE: list[tuple[list[str], str]] = [
    (["run", "--backend=/b"], "one of --socket-path, --fd"),
    (["run", "--front-connect=/f", "--fd=3", "--backend=/b"], "exclude each other"),
    (["run", *WAYS, "--backend-listen=/b"], "exclude each other"),
    (["run", *WAYS, "--backend-fd=3"], "--backend and --backend-fd exclude each other"),
    (["run", "--fd=5", "--backend-fd=5"], "--fd and --backend-fd are the same sock"),
    (
        ["run", "--fd=998", "--backend-fd=999", "--on-backend-loss=recover"],
        "--on-backend-loss recover: descriptor 999 is one connection, after which no",
    ),
    (["run", *WAYS, "--stats-path=/x/../front"], "/front and --stats-path /x/../front"),
    (
        ["run", *WAYS, "--stats-path=/back"],
        "--backend /back and --stats-path /back are",
    ),
    (["run", "--socket-path=/f", "--backend=//f"], "/f and --backend //f are the same"),
    *(
        (["run", f"--fd={bad}", "--backend=/b"], f"--fd: {bad}: no number from 0")
        for bad in ("", "-1", "99999999999999999999")
    ),
    (["run", *WAYS, "--nonsense"], r"--nonsense \(see vhost-airlock run --help"),
    *(
        (["run", *WAYS, f"--pool-limit={bad}"], f"--pool-limit: {bad}: no size from 4K")
        for bad in (
            *("0", "4095", "3K", "-1", "-4096", "1T", "5G", "4294967297", "1.5G"),
            *("", "M", "64 M", "0x1000", "much", "64MM", "1e6", "inf", "nan"),
        )
    ),
    (["run", *WAYS, f"--pool-limit={'9' * 5000}"], "no size from 4K to 4G"),
    *(
        (["run", *WAYS, f"--poll-us={bad}"], f"--poll-us: {bad}: no number from 0 to")
        for bad in ("-1", "1000001", "1.5", "", "soon")
    ),
    *(
        (["run", *WAYS, f"--workers={bad}"], f"--workers: {bad}: no number from 1 to")
        for bad in ("0", "65", "-1", "all")
    ),
    *(
        (["run", *WAYS, f"--worker-cpus={bad}"], f"--worker-cpus: {bad}: no list of")
        for bad in ("", "0,", "-1", "0-", "3-2", "0x1", "0 1", "9999999", "any")
    ),
    (["run", *WAYS, "--worker-cpus=0-9"], "0-9: may not run on processor 8"),
    *(
        (["run", *WAYS, f"--{name}timeout={bad}"], f"{bad}: no number of seconds")
        for name in ("", "drain-")
        for bad in ("0", "-1", "3601", "inf", "nan", "soon", "")
    ),
    *(
        (["attack", "--as-guest=/s", f"--timeout={bad}"], f"{bad}: no number of sec")
        for bad in ("-1", "nan")
    ),
    *(
        (
            ["run", *WAYS, f"--socket-mode={bad}"],
            f"--socket-mode: {bad}: no mode in oct",
        )
        for bad in ("", "60", "0680", "1777", "0o660", "u=rw", "-660")
    ),
    *(
        (
            ["run", *WAYS, f"--socket-group={bad}"],
            f"group: {bad}: there is no such group",
        )
        for bad in ("", "no-such-group", "-1", "9999999999")
    ),
    *(
        (
            ["run", "--fd=3", "--backend=/b", f"--socket-{name}"],
            "needs one of --socket-path, --backend-listen, --stats-path",
        )
        for name in ("mode=0660", "group=root")
    ),
    (["run", *WAYS, "--log-level=loud"], "--log-level: .*'loud'"),
    *(
        (["run", *WAYS, f"--name={bad}"], f"--name: {shown}: no name of 1 to 64")
        for bad, shown in (
            ("", "''"),
            ("a\nb", r"'a\\nb'"),
            ("n" * 65, f"'{'n' * 65}'"),
        )
    ),
    (["run", "--socket-path=/f", "--", "back"], r"either \{fd\} or \{listen-fd\}"),
    (["run", "--socket-path=/f", "--", "b", "{fd}{listen-fd}"], r"either \{fd\} or"),
]


@each_row(UNUSABLE)
def test_unusable_arguments_are_told_in_one_line(
    arguments: list[str], text: str, *, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(arguments)
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("vhost-airlock: ")
    assert re.search(text, err), err


@pytest.mark.parametrize("kind", [each for each in TYPES if each.refused], ids=str)
def test_device_that_can_not_be_isolated_is_refused(
    capsys: pytest.CaptureFixture[str], kind: Any
) -> None:
    assert cli.main(["run", *WAYS, f"--device-type={kind.name}"]) == 1
    assert capsys.readouterr().err == (
        f"vhost-airlock: a {kind.name} device can't be isolated: {kind.refused}\n"
    )


@pytest.mark.parametrize("kind", [each for each in TYPES if each.stateful], ids=str)
def test_device_with_state_can_not_recover(
    kind: DeviceType, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--device-type={kind.name}", "--on-backend-loss=recover"]
    assert cli.main(["run", *WAYS, *options]) == 2
    assert f"{kind.name} has {kind.stateful}" in capsys.readouterr().err
    assert not kind.recovers


def test_device_types_have_names_and_numbers_of_their_own() -> None:
    assert len({kind.name for kind in TYPES}) == len(TYPES)
    assert len({kind.number for kind in TYPES}) == len(TYPES)
    assert {kind.copy for kind in TYPES} <= set(POLICIES)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    assert "vhost-airlock" in out
    assert err == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"vhost-airlock {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_reader_of_the_output_may_leave(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    out, into = os.pipe()
    os.close(out)
    with open(into, "wb") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", "vhost_airlock", *arguments],
            stdout=stdout,
            stderr=subprocess.PIPE,
        )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_every_option_has_a_text() -> None:
    _, commands = cli.parsers(cli.COMMANDS)
    for name, parser in commands.items():
        assert parser.description, name
        for action in parser._actions:
            assert action.help, (name, action.dest)
            assert action.help[0].islower(), (name, action.dest)
            assert not action.help.endswith("."), (name, action.dest)


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    text = capsys.readouterr().out
    for name in (*fields(Config), *fields(ProcessConfig)):
        # Of the device, what follows from its type, and from the service manager.
        if name not in (
            *("command", "device", "whole_batches", "has_error", "grows"),
            *("recover", "recover_time", "exit_with_backend"),
            *("stateful", "stats_fd", "control_fd", "notify_socket"),
        ):
            assert "--" + name.replace("_", "-") in text
