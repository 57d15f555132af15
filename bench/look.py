# SPDX-License-Identifier: Apache-2.0
"""How the page looks: its style sheet, and a mark of its own for each target.

Targets and parts differ by colour, and also by shape, dashes or hatching. The colours
are those of Okabe and Ito, which colour-blind people can tell apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.targets import NAMES


@dataclass(frozen=True)
class Look:
    """A target's colour on a light and on a dark page, its dashes and its mark."""

    light: str
    dark: str
    dashes: str
    mark: str
    """An outline around (0, 0), as SVG has paths."""


LOOKS = dict(
    zip(
        NAMES,
        (
            Look("#111827", "#f3f4f6", "none", "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z"),
            Look("#7b8494", "#9ca3af", "2 3", "M-3.5 -3.5h7v7h-7z"),
            Look("#0072b2", "#56b4e9", "none", "M0 -5.5L5.5 0L0 5.5L-5.5 0z"),
            Look("#cc79a7", "#e79fc6", "7 3", "M0 -5L5 4H-5z"),
            Look("#009e73", "#2fc79b", "7 3 2 3", "M0 5L5 -4H-5z"),
            Look(
                "#d55e00",
                "#f58a3c",
                "4 2",
                "M-1.5 -5h3v3.5h3.5v3h-3.5V5h-3v-3.5H-5v-3h3.5z",
            ),
        ),
        strict=True,
    )
)
HATCHING = {
    "front": ("#cfd4dc", "#6b7280", ""),
    "airlock": ("#0072b2", "#56b4e9", "M0 6L6 0M-1 1L1 -1M5 7L7 5"),
    "back": ("#7b8494", "#374151", "M3 3h.01"),
}
"""Of the CPU time's parts: light colour, dark colour, and a pattern of 6 by 6."""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #111827; --soft: #4b5563;
        --line: #e5e7eb; --box: #f9fafb; --fast: #5aaeea;
        --slow: #f0934e; }
@media (prefers-color-scheme: dark) {
  :root { --page: #111418; --ink: #f3f4f6; --soft: #aeb6c2; --line: #2f353d;
          --box: #191d23; --fast: #1f5f94; --slow: #93501c; }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink);
       background: var(--page); margin: 0; padding: 24px clamp(16px, 3vw, 64px); }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 19px; margin: 36px 0 4px; }
h3 { font-size: 15px; margin: 8px 0 4px; }
p { margin: 4px 0 10px; color: var(--soft); max-width: 100ch; }
.result { font-size: 19px; color: var(--ink); }
.tiles, .tables, .charts { display: grid; gap: 12px 24px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); }
.tables { grid-template-columns: repeat(auto-fit, minmax(min(640px, 100%), 1fr)); }
.tables > div { min-width: 0; overflow-x: auto; }
.charts { grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); }
.tile { border: 1px solid var(--line); border-radius: 6px; padding: 8px 12px; }
.tile b { font-size: 26px; display: block; } .tile small { color: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th { text-align: right; font-weight: 600; padding: 3px 10px; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td { text-align: right; padding: 3px 10px; border: 1px solid var(--page);
     white-space: nowrap; }
th .key { display: block; margin: 0 0 0 auto; }
.goals td, .goals th { text-align: left; border-color: var(--line);
                       white-space: normal; }
.legend { position: sticky; top: 0; background: var(--page); padding: 6px 0;
          max-width: none; z-index: 1; }
.legend span { display: inline-block; margin-right: 22px; color: var(--ink); }
.key { width: 34px; height: 14px; vertical-align: -2px; margin-right: 6px; }
.charts svg { width: 100%; height: auto; }
svg text { font: 11.5px system-ui, sans-serif; fill: var(--soft); }
svg .title { font-weight: 600; font-size: 13px; fill: var(--ink); }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .grid { stroke: var(--line); } svg polyline { fill: none; stroke-width: 2; }
svg .spread { stroke-width: 1.5; opacity: .6; fill: none; }
svg .mark { stroke: var(--page); stroke-width: 1; }
pre { overflow-x: auto; font-size: 12px; background: var(--box); padding: 12px; }
"""


def style_sheet() -> str:
    """Return all styles, those of targets and parts among them."""
    found = [STYLE]
    for name, look in LOOKS.items():
        found.append(
            f".{name} {{ --colour: {look.light}; }}\n"
            f".{name} polyline, .{name} .spread {{ stroke: var(--colour); }}\n"
            f".{name} polyline {{ stroke-dasharray: {look.dashes}; }}\n"
            f".{name} .mark {{ fill: var(--colour); }}"
        )
    for name, (light, _, _) in HATCHING.items():
        found.append(
            f"#part-{name} {{ --colour: {light}; }}"
            f" rect.part-{name} {{ fill: url(#part-{name}); }}"
        )
    dark = [f".{name} {{ --colour: {look.dark}; }}" for name, look in LOOKS.items()]
    dark += [
        f"#part-{n} {{ --colour: {dark}; }}" for n, (_, dark, _) in HATCHING.items()
    ]
    found.append(f"@media (prefers-color-scheme: dark) {{ {' '.join(dark)} }}")
    return "\n".join(found)


def patterns() -> str:
    """Return the hatching of the parts, to be somewhere in the page."""
    found = [
        f'<pattern id="part-{name}" width="6" height="6" patternUnits="userSpaceOnUse">'
        '<rect width="6" height="6" style="fill:var(--colour)"/>'
        f'<path d="{hatching or "M0 0"}" style="stroke:var(--page);stroke-width:1.5;'
        'stroke-linecap:round"/></pattern>'
        for name, (_, _, hatching) in HATCHING.items()
    ]
    return f'<svg width="0" height="0"><defs>{"".join(found)}</defs></svg>'


def key(name: str) -> str:
    """Return a target's line and mark, to stand beside its name."""
    return (
        f'<svg class="key {name}" viewBox="0 0 34 14"><polyline points="0,7 34,7"/>'
        f'<path class="mark" transform="translate(17 7)" d="{LOOKS[name].mark}"/></svg>'
    )


def legend(names: Iterable[str]) -> str:
    """Return the lines and marks of targets."""
    keys = "".join(f"<span>{key(name)}{name}</span>" for name in names)
    return f'<p class="legend">{keys}</p>'


def legend_of_parts() -> str:
    """Return the hatching of the parts."""
    keys = "".join(
        f'<span><svg class="key" viewBox="0 0 34 14"><rect class="part-{name}"'
        f' width="34" height="14"/></svg>{name}</span>'
        for name in HATCHING
    )
    return f'<p class="legend">{keys}</p>'
