# SPDX-License-Identifier: Apache-2.0
"""`vhost-airlock stats`: the forms in which it prints the answers of airlocks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.stats import BEFORE, answering, encoded, later
from vhost_airlock.cli import main as cli
from vhost_airlock.cli.stats_table import table


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


# Several airlocks.

OTHER = replace(BEFORE, name="net.sock", sessions=7)


def test_each_airlock_has_its_table_or_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that fails is told after the others, and in the status."""
    with (
        answering(tmp_path / "a", [encoded(BEFORE)] * 3) as disk,
        answering(tmp_path / "b", [encoded(OTHER)] * 3) as net,
    ):
        assert cli.main(["stats", disk, net]) == 0
        out, err = capsys.readouterr()
        assert out == f"{table(BEFORE)}\n\n{table(OTHER)}\n"
        assert err == ""

        assert cli.main(["stats", str(tmp_path), "--json"]) == 0
        names = [
            json.loads(line)["name"]
            for line in capsys.readouterr().out.split("\n")[:-1]
        ]
        assert names == ["disk.sock", "net.sock"]

        gone = str(tmp_path / "gone")
        assert cli.main(["stats", disk, gone, net]) == 1
        out, err = capsys.readouterr()
        assert out == f"{table(BEFORE)}\n\n{table(OTHER)}\n"
        assert err == (
            f"vhost-airlock: no airlock's stats at {gone}: No such file or directory\n"
        )


def test_prometheus_gets_all_airlocks_and_the_failures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text is whole, so the status is 0, though the failure is told too."""
    with answering(tmp_path / "a", [encoded(BEFORE)]) as disk:
        gone = str(tmp_path / "gone")
        assert cli.main(["stats", "--prometheus", disk, gone]) == 0
    out, err = capsys.readouterr()
    families = {each.name: each for each in text_string_to_metric_families(out)}
    up = {
        each.labels["name"]: each.value for each in families["vhost_airlock_up"].samples
    }
    assert up == {"disk.sock": 1, "gone": 0}
    assert err.startswith(f"vhost-airlock: no airlock's stats at {gone}: ")


def test_rates_have_a_line_for_each_airlock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that does not answer is told once, and left out until it answers again."""
    more = later(2.0, ring_0={"completions": 500})
    slow = [encoded(BEFORE), b"", b"", encoded(BEFORE), encoded(more)]
    with (
        answering(
            tmp_path / "a", [encoded(BEFORE), encoded(more)] * 2 + [encoded(more)]
        ),
        answering(tmp_path / "b", [each.replace(b"disk", b"slow") for each in slow]),
    ):
        command = ["stats", str(tmp_path), "--interval=0.01", "--count=4"]
        assert cli.main(command) == 0
    out, err = capsys.readouterr()
    heading, *lines = out.splitlines()
    assert heading.endswith("in flight  airlock")
    assert [line.split()[-1] for line in lines] == ["disk.sock"] * 4 + ["slow.sock"]
    assert (lines[0].split()[0], lines[-1].split()[0]) == ("250", "250")
    assert (
        err == f"vhost-airlock: no airlock's stats at {tmp_path}/b: it is another's\n"
    )


@pytest.mark.parametrize("form", [[], ["--json"], ["--interval=1"]])
def test_folder_without_airlocks_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: list[str]
) -> None:
    assert cli.main(["stats", str(tmp_path), *form]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"vhost-airlock: no airlock's stats at {tmp_path}\n")


def test_folder_without_airlocks_has_no_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["stats", str(tmp_path), "--prometheus"]) == 0
    assert capsys.readouterr() == ("", "")
