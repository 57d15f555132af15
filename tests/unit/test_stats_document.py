# SPDX-License-Identifier: Apache-2.0
"""Asking airlocks for their state: documents, and answers that are none."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.stats import BEFORE, answering, encoded
from vhost_airlock.cli import main as cli
from vhost_airlock.cli import stats_document
from vhost_airlock.cli.stats_document import NoStats, ask, ask_all, parse


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
    json.dumps({**vars(BEFORE), "counters": {"pool": {"used": "all"}}}).encode(),
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
        "file": "no process listens there",
    }.items():
        path = str(tmp_path / name)
        assert cli.main(["stats", path]) == 1
        assert capsys.readouterr().err == (
            f"vhost-airlock: no airlock's stats at {path}: {reason}\n"
        )


def test_who_says_nothing_is_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats_document, "PATIENCE", 0.05)
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(NoStats, match="no answer"):
            ask(str(path))


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
    monkeypatch.setattr(stats_document, "LARGEST", 10)
    with (
        answering(tmp_path / "s", [b"x" * 100]) as path,
        pytest.raises(NoStats, match="too much"),
    ):
        ask(path)


def test_folder_stands_for_the_stats_in_it(tmp_path: Path) -> None:
    """The servers of other sockets in it notice nothing."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(str(tmp_path / "stale"))
    with (
        socket.socket(socket.AF_UNIX) as vmms,
        answering(tmp_path / "b", [encoded(BEFORE)] * 2) as second,
        answering(tmp_path / "a", [encoded(BEFORE)]) as first,
        answering(tmp_path / "junk", [b"junk"]) as junk,
    ):
        vmms.bind(str(tmp_path / "vmm"))
        vmms.listen()
        vmms.setblocking(False)
        answers, failures = ask_all([str(tmp_path)])
        with pytest.raises(BlockingIOError):
            vmms.accept()
        assert [each.path for each in answers] == [first, second]
        assert [each.path for each in failures] == [junk]
        answers, failures = ask_all([str(tmp_path / "vmm"), second])
        assert [each.path for each in answers] == [second]
        assert [each.path for each in failures] == [str(tmp_path / "vmm")]


def test_airlocks_are_asked_at_the_same_time(tmp_path: Path) -> None:
    """Each answers when all are asked."""
    all_asked = threading.Barrier(3)
    with ExitStack() as stack:
        paths = [
            stack.enter_context(
                answering(tmp_path / name, [encoded(BEFORE)], all_asked.wait)
            )
            for name in ("a", "b", "c")
        ]
        answers, failures = ask_all(paths)
    assert [each.path for each in answers] == paths
    assert not failures
