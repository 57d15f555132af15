# SPDX-License-Identifier: Apache-2.0
"""The benchmark's verdicts: seldom wrong, and given where there is something to see."""

import math
import os
import random
import statistics
import subprocess
import sys

import pytest

from bench.against import build, export
from bench.machine import placed
from bench.runs import BenchError
from bench.sure import DRAWS, ENOUGH, LEVEL, Ratio, Verdict, overall


def noisy(truth: float, pairs: int, chance: random.Random) -> list[float]:
    """Ratios as they are measured: some per cent of noise, and in half of the pairs one
    of the two runs had the worse place.
    """
    return [
        truth * math.exp(chance.gauss(0, 0.05) + chance.choice((0, 0, 0.3, -0.3)))
        for _ in range(pairs)
    ]


@pytest.mark.parametrize("pairs", [ENOUGH, 20])
def test_interval_has_the_truth_in_it(pairs):
    """99 of 100 should have it. Of 60 tries, 4 or more would miss it once in 300."""
    chance = random.Random(7)
    tries = [Ratio.of_pairs(noisy(1.3, pairs, chance)) for _ in range(60)]
    missed = sum(not each.low <= 1.3 <= each.high for each in tries)
    assert missed < 4
    # It is no wider than the figures are.
    assert all(each.high / each.low < 3 for each in tries)


def test_more_pairs_tell_more():
    chance = random.Random(3)
    widths = [
        statistics.median(
            ratio.high / ratio.low
            for ratio in (Ratio.of_pairs(noisy(1.0, pairs, chance)) for _ in range(20))
        )
        for pairs in (8, 20, 60)
    ]
    assert widths[0] > widths[1] > widths[2]


@pytest.mark.parametrize(
    ("truth", "verdict"),
    [(1.5, Verdict.BETTER), (0.6, Verdict.WORSE), (1.0, Verdict.UNSURE)],
)
def test_verdict_of_what_is_plain(truth, verdict):
    ratio = Ratio.of_pairs(noisy(truth, 30, random.Random(5)))
    assert ratio.verdict() is verdict
    contrary = {Verdict.BETTER: Verdict.WORSE, Verdict.WORSE: Verdict.BETTER}
    assert ratio.verdict(better=-1) is contrary.get(verdict, verdict)


def test_one_disturbed_pair_moves_nothing():
    calm = [1.10 + 0.001 * i for i in range(19)]
    ratio = Ratio.of_pairs([*calm, 40.0])
    assert 1.10 < ratio.low <= ratio.median <= ratio.high < 1.13


def test_same_runs_have_the_same_interval():
    ratios = noisy(1.0, 20, random.Random(1))
    assert Ratio.of_pairs(ratios) == Ratio.of_pairs(ratios)


def test_few_pairs_tell_nothing():
    assert Ratio.of_pairs([2.0] * (ENOUGH - 1)).verdict() is Verdict.UNSURE
    assert Ratio.of_pairs([2.0] * ENOUGH).verdict() is Verdict.BETTER
    # By chance alone, that many are all on one side more seldom than a verdict may err.
    assert 2 * 0.5**ENOUGH <= 1 - LEVEL < 2 * 0.5 ** (ENOUGH - 1)


def test_no_pairs_are_an_error():
    for cases in ([], [[1.0], []]):
        with pytest.raises(ValueError, match="no pairs"):
            overall(cases)


def test_mean_of_many_noisy_cases_is_surer_than_each():
    chance = random.Random(9)
    cases = [noisy(1.05, 12, chance) for _ in range(20)]
    mean = overall(cases)
    assert mean.low <= 1.05 <= mean.high
    widest = max(ratio.high / ratio.low for ratio in map(Ratio.of_pairs, cases))
    assert mean.high / mean.low < widest / 1.2
    assert mean.pairs == 12
    assert DRAWS * (1 - LEVEL) / 2 >= 5, "the ends of the interval are no extremes"


# Places.


def test_programs_stay_where_they_were_started():
    ask = [sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"]
    cores = sorted(os.sched_getaffinity(0))
    for at, core in enumerate(cores):
        with placed(at):
            said = subprocess.run(ask, capture_output=True, text=True, check=True)
        assert said.stdout.strip() == str({core})
        assert sorted(os.sched_getaffinity(0)) == cores
    for nowhere in (None, len(cores)):
        with placed(nowhere):
            assert sorted(os.sched_getaffinity(0)) == cores


# Two builds.

SETUP = """
import pathlib, sys
assert sys.argv[1:] == ["--quiet", "build_ext", "--inplace"]
text = pathlib.Path("source").read_text()
if text == "bad":
    raise SystemExit("a bad source")
with open("src", "a") as built:
    built.write(text)
"""


@pytest.fixture
def project(tmp_path):
    """A project of two commits: each is built by copying one file."""

    def git(*words: str) -> None:
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", *who, "-C", str(tmp_path), *words], check=True)

    git("init", "--quiet")
    (tmp_path / "setup.py").write_text(SETUP)
    for number in ("one", "two", "bad"):
        (tmp_path / "source").write_text(number)
        git("add", ".")
        git("commit", "--quiet", "--message", number)
    (tmp_path / "source").write_text("not committed")
    return tmp_path


def test_a_revision_is_built_once_as_it_was_committed(project):
    for revision, text in (("HEAD~2", "one"), ("HEAD~1", "two"), ("HEAD~2", "one")):
        assert build(revision, project).read_text() == text
    assert (project / "source").read_text() == "not committed"


def test_a_revision_that_cannot_be_built(project):
    for _ in range(2):
        with pytest.raises(BenchError, match=r"HEAD cannot be built:\na bad source"):
            build("HEAD", project)
    with pytest.raises(BenchError, match="there is no revision HEAD~9"):
        build("HEAD~9", project)
    with pytest.raises(BenchError, match="cannot write the files of 1234567"):
        export(project, "1234567", project)
