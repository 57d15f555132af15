# SPDX-License-Identifier: Apache-2.0
"""Runs targets under libFuzzer, a few at a time: `tools/fuzz [option]... [target]...`.

Inputs that an earlier run kept are in build/fuzz/corpus. A run starts with these and
with fuzz/corpus, the small part of them that is kept in the repository.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "fuzz"
TARGETS = sorted(path.stem for path in (ROOT / "fuzz" / "targets").glob("[a-z]*.py"))
GRACE = 300
"""Seconds more than asked for, in which a run has to end."""


def environment() -> dict[str, str]:
    import atheris

    return os.environ | {
        "LD_PRELOAD": f"{atheris.path()}/asan_with_fuzzer.so",
        "ASAN_OPTIONS": "detect_leaks=0:handle_abort=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(BUILD / "lib"),
    }


def engine(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "fuzz.engine", name, *map(str, arguments)]


def fuzz(name: str, seconds: int) -> bool:
    """Run one target, and print its result in a line; returns True if that is good."""
    corpus, findings = BUILD / "corpus" / name, BUILD / "findings"
    log = BUILD / f"{name}.log"
    for folder in (corpus, findings):
        folder.mkdir(parents=True, exist_ok=True)
    command = engine(
        name,
        f"-max_total_time={seconds}",
        f"-artifact_prefix={findings}/{name}-",
        "-timeout=60",
        "-rss_limit_mb=3000",
        "-max_len=1500",
        "-len_control=20",
        "-print_final_stats=1",
        corpus,
        *filter(Path.exists, [ROOT / "fuzz" / "corpus" / name]),
    )
    with log.open("w") as out:
        try:
            status = subprocess.run(
                command,
                cwd=ROOT,
                env=environment(),
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=seconds + GRACE,
            ).returncode
        except subprocess.TimeoutExpired:
            status = -1
    text = log.read_text(errors="replace")
    print(f"{name}: {summary(text)}", flush=True)
    if status == 0:
        return True
    found = re.search(r"Test unit written to (\S+)", text)
    print(explain(text))
    if found:
        print(f"{name}: this input does it: {found[1]}")
        print(f"{name}: replay it: tools/fuzz {name} --replay {found[1]}")
    print(f"{name}: FAILED (status {status}); all of it: {log}", flush=True)
    return False


def summary(log: str) -> str:
    """Return the figures in libFuzzer's output, in short."""
    seen = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", log)
    runs = re.search(r"number_of_executed_units: (\d+)", log)
    speed = re.search(r"average_exec_per_sec: +(\d+)", log)
    if not seen:
        return "it did not start"
    (edges, features, _), (edges_then, features_then, inputs) = seen[0], seen[-1]
    return (
        f"{runs[1] if runs else '?'} runs, {speed[1] if speed else '?'} a second;"
        f" edges {edges} to {edges_then}, features {features} to {features_then},"
        f" {inputs} inputs"
    )


def explain(log: str) -> str:
    """Return the part of the log with the error."""
    lines = log.splitlines()
    for i, line in enumerate(lines):
        if "Uncaught Python exception" in line or "ERROR:" in line:
            return "\n".join(lines[i : i + 40])
    return "\n".join(lines[-20:])


def keep(name: str) -> None:
    """Add to fuzz/corpus the inputs that cover more than it does by itself."""
    kept = ROOT / "fuzz" / "corpus" / name
    kept.mkdir(parents=True, exist_ok=True)
    options = "-set_cover_merge=1", "-max_len=1500"
    command = engine(name, *options, kept, BUILD / "corpus" / name)
    subprocess.run(command, cwd=ROOT, env=environment(), check=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/fuzz")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", action="store_true", help="add to fuzz/corpus")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="one input only")
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS])
    chosen = parser.parse_args()
    targets = chosen.targets or TARGETS
    if chosen.replay:
        command = engine(targets[0], chosen.replay)
        return subprocess.run(command, cwd=ROOT, env=environment()).returncode
    if chosen.keep:
        for name in targets:
            keep(name)
        return 0
    began = time.monotonic()
    with ThreadPoolExecutor(chosen.jobs) as pool:
        well = list(pool.map(lambda name: fuzz(name, chosen.seconds), targets))
    print(f"fuzzed {len(targets)} targets in {time.monotonic() - began:.0f} s")
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
