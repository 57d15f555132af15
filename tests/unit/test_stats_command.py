# SPDX-License-Identifier: Apache-2.0
"""`vhost-airlock stats`: what it makes of documents, and of what is none."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vhost_airlock.cli import main as cli
from vhost_airlock.cli import stats
from vhost_airlock.cli.stats import MIB, Document, Rates, parse, prometheus, table
from vhost_airlock.errors import StartError

RING = {
    "chains": 1000,
    "completions": 900,
    "bytes_in": 10 * MIB,
    "bytes_out": 20 * MIB,
    "kicks": 100,
    "calls": 90,
    "outstanding": 7,
}
WORKER = {"rounds": 5000, "sleeps": 50, "polled": 1_000_000_000}
BEFORE = Document(
    name="disk.sock",
    version="1.2.3",
    uptime=100.0,
    sessions=2,
    vmm_connected=True,
    vmm_waits=False,
    backend_connected=True,
    rings={
        "ring 0": {"phase": "running", "fault": None},
        "ring 1": {"phase": "disabled", "fault": "it fell over"},
        "ring 2": {"phase": "stopped", "fault": None},
    },
    counters={
        "ring 0": RING,
        "ring 1": dict.fromkeys(RING, 0),
        "worker 0": WORKER,
        "worker 1": dict.fromkeys(WORKER, 0),
        "pool": {"used": 4096, "resident": 8192},
    },
)


def later(seconds: float, **more: dict[str, int]) -> Document:
    """BEFORE after so long, with so much more of some counters."""
    counters = {group: dict(each) for group, each in BEFORE.counters.items()}
    for group, added in more.items():
        for name, value in added.items():
            counters[group.replace("_", " ")][name] += value
    return replace(BEFORE, uptime=BEFORE.uptime + seconds, counters=counters)


def test_rates_are_differences_by_time_and_by_request() -> None:
    after = later(
        4.0,
        ring_0={"chains": 500, "completions": 600, "kicks": 50, "bytes_in": 6 * MIB},
        ring_1={"chains": 300, "completions": 200, "calls": 200, "bytes_out": 2 * MIB},
        worker_0={"polled": 1_000_000_000, "sleeps": 30},
        worker_1={"polled": 3_000_000_000, "sleeps": 50},
    )
    after.counters["ring 1"]["outstanding"] = 3
    assert Rates.between(BEFORE, after) == Rates(
        requests=800 / 4,
        mib_in=6 / 4,
        mib_out=2 / 4,
        kicks=50 / 800,
        calls=200 / 800,
        sleeps=80 / 4,
        polling=4 / (4 * 2),
        outstanding=7 + 3,
    )


def test_nothing_done_is_no_ratio() -> None:
    rates = Rates.between(BEFORE, later(1.0))
    assert (rates.requests, rates.kicks, rates.calls) == (0, None, None)
    assert stats.rates_line(rates).split() == [
        "0",
        "0.0",
        "0.0",
        "-",
        "-",
        "0",
        "0.0%",
        "7",
    ]


@pytest.mark.parametrize(
    ("change", "seconds"),
    [({"sessions": 3, "uptime": 102.0}, 2.0), ({"uptime": 5.0}, 5.0)],
    ids=["session", "process"],
)
def test_what_is_new_has_counted_from_zero(
    change: dict[str, Any], seconds: float
) -> None:
    rates = Rates.between(BEFORE, replace(BEFORE, **change))
    assert rates.requests == 900 / seconds
    assert rates.kicks == 100 / 1000


def test_session_that_ends_has_no_negative_rates() -> None:
    after = replace(later(1.0), rings={}, counters={}, vmm_connected=False)
    assert Rates.between(BEFORE, after) == Rates(0, 0, 0, None, None, 0, 0, 0)


def test_table_has_all_there_is() -> None:
    lines = table(BEFORE).splitlines()
    assert lines[:2] == [
        "disk.sock: VMM connected, back-end connected",
        "vhost-airlock 1.2.3, up 0:01:40, sessions: 2",
    ]
    cells = [line.split() for line in lines]
    assert ["ring", "0", "ring", "1", "ring", "2"] in cells
    assert ["phase", "running", "disabled", "stopped"] in cells
    assert ["bytes_in", f"{10 * MIB:,}", "0", "-"] in cells
    assert "worker 0: rounds 5,000, sleeps 50, polled 1,000,000,000" in lines
    assert "pool: used 4,096, resident 8,192" in lines
    assert lines[-1] == "ring 1 is broken: it fell over"
    assert max(map(len, lines)) <= 88


def test_table_without_a_session() -> None:
    idle = replace(
        BEFORE, vmm_connected=False, backend_connected=False, rings={}, counters={}
    )
    assert table(idle) == (
        "disk.sock: no VMM, no back-end\nvhost-airlock 1.2.3, up 0:01:40, sessions: 2"
    )


def test_table_says_that_a_vmm_waits() -> None:
    second = replace(BEFORE, vmm_waits=True)
    first = replace(second, vmm_connected=False, backend_connected=False)
    assert [table(each).splitlines()[0] for each in (second, first)] == [
        "disk.sock: VMM connected, another waits, back-end connected",
        "disk.sock: VMM waits, no back-end",
    ]


def test_rings_of_a_large_device_stand_below_each_other() -> None:
    rings = {f"ring {i}": {"phase": "running", "fault": None} for i in range(9)}
    counters = {ring: {"chains": i} for i, ring in enumerate(rings)}
    lines = table(replace(BEFORE, rings=rings, counters=counters)).splitlines()
    chains = [line.split()[1:] for line in lines if line.startswith("chains")]
    assert chains == [list("0123"), list("4567"), ["8"]]
    assert max(map(len, lines)) <= 88


def test_prometheus_has_a_sample_for_each_number() -> None:
    samples: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for line in prometheus(BEFORE).splitlines():
        if line.startswith("# TYPE "):
            name, kind = line.split()[2:]
            assert name not in kinds, "a metric's samples stand together"
            kinds[name] = kind
        else:
            sample, value = line.rsplit(" ", 1)
            assert sample.split("{")[0] == name
            assert sample not in samples
            samples[sample] = value
    assert samples['vhost_airlock_ring_chains_total{ring="0"}'] == "1000"
    assert samples['vhost_airlock_ring_chains_total{ring="1"}'] == "0"
    assert samples['vhost_airlock_ring_broken{ring="1"}'] == "1"
    assert samples['vhost_airlock_ring_broken{ring="2"}'] == "0"
    assert samples['vhost_airlock_worker_polled_total{worker="0"}'] == "1000000000"
    assert samples["vhost_airlock_pool_used"] == "4096"
    assert samples["vhost_airlock_vmm_connected"] == "1"
    assert samples["vhost_airlock_vmm_waits"] == "0"
    assert kinds["vhost_airlock_ring_chains_total"] == "counter"
    assert kinds["vhost_airlock_ring_outstanding"] == "gauge"
    numbers = sum(len(each) for each in BEFORE.counters.values())
    assert len(samples) == numbers + len(BEFORE.rings) + 6


# Whom it asks.


@contextmanager
def answering(path: Path, answers: Sequence[bytes]) -> Iterator[str]:
    """Somebody who listens, and says this to one after the other."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            for answer in answers:
                with listener.accept()[0] as sock:
                    if answer:  # an empty packet is taken for the end
                        sock.send(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield str(path)
        thread.join()


def encoded(document: Document) -> bytes:
    return json.dumps(vars(document)).encode()


def test_what_is_not_known_yet_is_left_out(tmp_path: Path) -> None:
    assert parse(json.dumps({**vars(BEFORE), "more": 1}), "p") == BEFORE


OTHERS = [
    b"",
    b"SSH-2.0-server\r\n",
    b"\xff\xfe",
    b"[1, 2]",
    b"null",
    b"{}",
    json.dumps({**vars(BEFORE), "rings": {"ring 0": 1}}).encode(),
    json.dumps({**vars(BEFORE), "counters": [1]}).encode(),
]


@pytest.mark.parametrize("answer", OTHERS)
@pytest.mark.parametrize("form", [[], ["--json"], ["--interval=1"]])
def test_who_is_no_airlock_is_told_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    answer: bytes,
    form: list[str],
) -> None:
    with answering(tmp_path / "s", [answer]) as path:
        assert cli.main(["stats", path, *form]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"vhost-airlock: no airlock's stats at {path}: it is another's\n"


def test_nobody_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for name, reason in {
        "none": "No such file or directory",
        "file": "Connection refused",
    }.items():
        path = str(tmp_path / name)
        assert cli.main(["stats", path]) == 1
        assert capsys.readouterr().err == (
            f"vhost-airlock: no airlock's stats at {path}: {reason}\n"
        )


def test_who_says_nothing_is_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "PATIENCE", 0.05)
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(StartError, match="no answer"):
            stats.ask(str(path))


def test_a_server_of_another_kind_notices_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The VMM's socket: connecting to it would take the VMM's place."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.setblocking(False)
        assert cli.main(["stats", str(path)]) == 1
        with pytest.raises(BlockingIOError):
            server.accept()
    assert capsys.readouterr().err == (
        f"vhost-airlock: no airlock's stats at {path}: the socket is a VMM's or a"
        " back-end's; see run --stats-path\n"
    )


def test_who_says_too_much_is_not_listened_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "LARGEST", 10)
    with (
        answering(tmp_path / "s", [b"x" * 100]) as path,
        pytest.raises(StartError, match="too much"),
    ):
        stats.ask(path)


def test_json_is_what_the_airlock_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(tmp_path / "s", [encoded(BEFORE)]) as path:
        assert cli.main(["stats", path, "--json"]) == 0
    assert capsys.readouterr().out == encoded(BEFORE).decode() + "\n"


def test_rates_come_so_many_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [BEFORE, later(2.0, ring_0={"completions": 500}), later(3.0)]
    answers = [encoded(document) for document in documents]
    with answering(tmp_path / "s", answers) as path:
        assert cli.main(["stats", path, "--interval=0.01", "--count=2"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split("  ")[0].strip() == "requests/s"
    assert [line.split()[0] for line in lines] == ["250", "0"]
    assert {len(line) for line in lines} == {len(heading)}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--count=1"],
        ["--interval=0"],
        ["--interval=x"],
        ["--interval=1", "--count=0"],
        ["--interval=1", "--json"],
        ["--json", "--prometheus"],
    ],
)
def test_what_makes_no_sense_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert cli.main(["stats", "/none", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
