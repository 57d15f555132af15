"""The results as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bench.runs import Case, Row, Spread

HEAD = (
    f"{'case':<18}{'target':<10}{'IOPS':>8} {'MB/s':>7} {'p50 us':>8} {'p99 us':>8}"
    f" | {'CPU us: front':>13} {'airlock':>8} {'back':>8} | {'ratio (lowest-highest)'}"
)


def report(rows: Sequence[Row], targets: Iterable[str]) -> str:
    """All there is to say: every figure, then the ratios of these targets."""
    parts = [full_table(rows), *(ratio_table(rows, name) for name in targets)]
    if any(row.disturbed for row in rows):
        parts.append("* other programs kept the machine busy meanwhile")
    return "\n\n".join(parts)


def full_table(rows: Iterable[Row]) -> str:
    """A line for each case and target; the cases apart by empty lines."""
    lines = [HEAD]
    last: Case | None = None
    for row in rows:
        if row.case != last:
            lines.append("")
        lines.append(line(row, "" if row.case == last else str(row.case)))
        last = row.case
    return "\n".join(lines)


def line(row: Row, name: str) -> str:
    cpu = row.cpu_us
    return (
        f"{name:<18}{row.target:<10}{row.iops.median:>8.0f} {row.mb_per_s:>7.0f}"
        f" {row.p50_us:>8.1f} {row.p99_us:>8.1f} | {cpu['front']:>13.2f}"
        f" {amount(cpu.get('airlock')):>8} {amount(cpu.get('back')):>8}"
        f" | {spread(row.ratio)}{'*' * bool(row.disturbed)}"
    )


def amount(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def spread(value: Spread) -> str:
    return f"{value.median:.2f} ({value.low:.2f}-{value.high:.2f})"


def ratio_table(rows: Sequence[Row], target: str) -> str:
    """The median ratios of a target: a line for each mode and size, by depth."""
    mine = {row.case: row for row in rows if row.target == target}
    depths = sorted({case.depth for case in mine})
    kinds = list(dict.fromkeys((case.mode, case.size) for case in mine))
    lines = [f"{target + ' / direct':<20}" + "".join(f"{d:>8}" for d in depths)]
    for mode, size in kinds:
        cells = (mine.get(Case(mode, size, depth)) for depth in depths)
        name = f"{Case(mode, size, 0).unit:>4} {mode}"
        text = f"{name:<20}" + "".join(f"{cell(row):>8}" for row in cells)
        lines.append(text.rstrip())
    return "\n".join(lines)


def cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row.ratio.median:.2f}{'*' if row.disturbed else ''}"


def heading(machine: Mapping[str, object]) -> str:
    """One line about machine and programs."""
    kind = "virtual cores" if machine["virtual"] else "cores"
    return (
        f"{machine['cpu']}, {machine['cores']} {kind}, kernel {machine['kernel']},"
        f" qemu-storage-daemon {machine['qemu-storage-daemon']},"
        f" libblkio {machine['libblkio']},"
        f" vhost-airlock {machine['vhost-airlock']} ({machine['commit']})"
    )
