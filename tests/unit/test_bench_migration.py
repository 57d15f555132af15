# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the benchmarks about migration."""

import re

from bench.dirty_log import Window, compare
from bench.downtime import report

PAIRS = 9


def test_log_is_compared_in_pairs():
    """The machine gets slower all the time; in each pair the log costs a tenth."""
    found = []
    for number in range(PAIRS):
        rate = 100_000 / (1 + number)
        off = Window(rate, cpu_us=1.0 + number)
        found.append((off, Window(0.9 * rate, cpu_us=1.2 * (1.0 + number))))
    said = compare(found)
    assert said.startswith(f"{PAIRS} pairs: rate 0.90 (0.90-0.90),")
    assert "CPU time a request 1.20 (1.20-1.20)" in said
    assert re.search(r"without 20000 requests/s .* 5.00 us, with 18000 .* 6.00$", said)


def test_downtimes_are_compared_in_pairs():
    found = [{"direct": 20.0 * n, "airlock": 30.0 * n} for n in (1, 2, 1, 3, 1)]
    pairs, medians = report(found).splitlines()
    assert "20 / 30, 40 / 60, 20 / 30, 60 / 90, 20 / 30 ms" in pairs
    assert "medians 20 and 30 ms, of the differences +10 ms" in medians
    assert "ratios 1.50 (1.50-1.50)" in medians
