# SPDX-License-Identifier: Apache-2.0
"""The results as text: for a terminal, and for the document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bench.runs import Case, Row

HEAD = (
    f"{'case':<32}{'target':<10}{'IOPS':>8} {'MB/s':>7} {'p50 us':>8} {'p99':>8}"
    f" {'p99.9':>8} | {'CPU us: front':>13} {'airlock':>8} {'back':>8}"
    f" | {'kicks':>12} {'calls':>12} {'switches':>8} | {'ratio (lowest-highest)'}"
)
STAR = "* other programs kept the machine busy meanwhile"
NOTES = (
    "For each request: kicks of front/airlock, calls to front by back or airlock,"
    " context switches of all processes"
)


def report(rows: Sequence[Row], targets: Iterable[str]) -> str:
    """Every figure, then the ratios of these targets."""
    parts = [full_table(rows), NOTES, *(ratio_table(rows, name) for name in targets)]
    if any(row.disturbed for row in rows):
        parts.append(STAR)
    return "\n\n".join(parts)


def full_table(rows: Iterable[Row]) -> str:
    """A line for each case and target, with empty lines between cases."""
    lines = [HEAD]
    last: Case | None = None
    for row in rows:
        if row.case != last:
            lines.append("")
        lines.append(line(row, "" if row.case == last else str(row.case)))
        last = row.case
    return "\n".join(lines)


def line(row: Row, name: str) -> str:
    cpu, sent = row.cpu_us, row.notices
    kicks = f"{amount(sent.get('front kicks'))}/{amount(sent.get('airlock kicks'))}"
    calls = amount(sent.get("airlock calls", sent.get("front calls")))
    switches = sum(sum(pair) for pair in row.switches.values())
    return (
        f"{name:<32}{row.target:<10}{row.iops.median:>8.0f} {row.mb_per_s:>7.0f}"
        f" {row.p50_us:>8.1f} {row.p99_us:>8.1f} {row.p999_us:>8.1f}"
        f" | {cpu['front']:>13.2f} {amount(cpu.get('airlock')):>8}"
        f" {amount(cpu.get('back')):>8}"
        f" | {kicks:>12} {calls:>12} {switches:>8.2f}"
        f" | {row.ratio}{'*' * bool(row.disturbed)}"
    )


def amount(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def ratio_table(rows: Sequence[Row], target: str) -> str:
    """The median ratios of a target: a line for each kind of case, by depth."""
    depths, kinds = axes(rows, target)
    lines = [f"{target + ' / direct':<28}" + "".join(f"{d:>8}" for d in depths)]
    for kind, mine in kinds.items():
        text = f"{kind:<28}" + "".join(f"{cell(mine.get(d)):>8}" for d in depths)
        lines.append(text.rstrip())
    return "\n".join(lines)


def axes(
    rows: Iterable[Row], target: str
) -> tuple[list[int], dict[str, dict[int, Row]]]:
    """The depths of a target's rows, and its rows by kind of case and by depth."""
    mine = [row for row in rows if row.target == target]
    kinds: dict[str, dict[int, Row]] = {}
    for row in mine:
        kinds.setdefault(row.case.kind, {})[row.case.depth] = row
    return sorted({row.case.depth for row in mine}), kinds


def cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row.ratio.median:.2f}{'*' if row.disturbed else ''}"


def heading(machine: Mapping[str, object]) -> str:
    """One line about machine and programs."""
    kind = "virtual cores" if machine["virtual"] else "cores"
    if (us := machine["idle_poll_us"]) is not None:
        kind += " that halt at once" if us == 0 else f" that poll {us} us when idle"
    return (
        f"{machine['cpu']}, {machine['cores']} {kind}, kernel {machine['kernel']},"
        f" qemu-storage-daemon {machine['qemu-storage-daemon']},"
        f" libblkio {machine['libblkio']},"
        f" vhost-airlock {machine['vhost-airlock']} ({machine['commit']})"
    )
