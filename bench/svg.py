# SPDX-License-Identifier: Apache-2.0
"""Charts as SVG text: lines over a few steps, and stacked bars.

Every point and bar has a title, which browsers show under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from vhost_airlock.cli.bench_report import Spread

WIDTH, HEIGHT = 380, 244
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 44, 32
BAR, GAP = 15, 4


@dataclass(frozen=True)
class Series:
    """One line: a spread at each step, or nothing."""

    name: str
    """Also the class of its elements, for a style sheet."""
    mark: str
    """The outline of its points."""
    values: Sequence[Spread | None]


def lines(
    title: str,
    steps: Sequence[str],
    series: Iterable[Series],
    unit: str,
    better: str,
    *,
    decades: bool = False,
) -> str:
    """A chart of lines, with the lowest and highest figures as bars.

    Its axis goes from zero up, or is divided into decades. `better` is "higher" or
    "lower".
    """
    series = list(series)
    figures = [v for s in series for v in s.values if v]
    marks, height_of = decades_axis(figures) if decades else plain_axis(figures)
    wide = (WIDTH - LEFT - RIGHT) / max(1, len(steps))

    def x(step: float) -> float:
        return LEFT + wide * (step + 0.5)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * height_of(value)

    parts = caption(title, unit, better)
    for mark in marks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(mark):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(text(LEFT - 6, y(mark) + 4, short(mark), "end"))
    for step, name in enumerate(steps):
        parts.append(text(x(step), HEIGHT - 12, name, "middle"))
    for number, each in enumerate(series):
        # Side by side, or the bars of spreads would hide each other.
        shift = (
            (number - (len(series) - 1) / 2) * min(5, wide / (len(series) + 1)) / wide
        )
        points = [
            (x(step + shift), value, steps[step])
            for step, value in enumerate(each.values)
            if value
        ]
        path = " ".join(f"{at:.1f},{y(value.median):.1f}" for at, value, _ in points)
        parts.append(f'<g class="{each.name}"><polyline points="{path}"/>')
        for at, value, step_name in points:
            parts.append(
                f"<g><title>{escape(each.name)}, {escape(step_name)}:"
                f" {short(value.median)} {unit}"
                f" ({short(value.low)} to {short(value.high)})</title>"
                f'<path class="spread" d="M{at:.1f} {y(value.low):.1f}'
                f'V{y(value.high):.1f}"/><path class="mark" d="{each.mark}"'
                f' transform="translate({at:.1f} {y(value.median):.1f})"/></g>'
            )
        parts.append("</g>")
    return svg(title, HEIGHT, parts)


Axis = tuple[list[float], Callable[[float], float]]
"""Its marks, and how high a figure is: 0 at the bottom, 1 at the top."""


def plain_axis(figures: Iterable[Spread]) -> Axis:
    """From zero up, in quarters."""
    top = nice(max((each.high for each in figures), default=1.0))
    return [top * i / 4 for i in range(5)], lambda value: value / top


def decades_axis(figures: Sequence[Spread]) -> Axis:
    """From one power of ten to another."""
    positive = [
        value for each in figures for value in (each.low, each.high) if value > 0
    ]
    first = math.floor(math.log10(min(positive, default=1.0)))
    last = max(first + 1, math.ceil(math.log10(max(positive, default=1.0))))

    def height(value: float) -> float:
        return (math.log10(value) - first) / (last - first) if value > 0 else 0.0

    return [10.0**power for power in range(first, last + 1)], height


def bars(
    title: str, rows: Sequence[tuple[str, Mapping[str, float]]], unit: str, better: str
) -> str:
    """Stacked bars, one below the other, with their sums.

    The bar of a part has the class `part-NAME`.
    """
    height = TOP + len(rows) * (BAR + GAP) + 6
    left = 72
    top = max((sum(parts.values()) for _, parts in rows), default=0.0) or 1.0
    scale = (WIDTH - left - 52) / top
    parts = caption(title, unit, better)
    for number, (name, figures) in enumerate(rows):
        y = TOP + number * (BAR + GAP)
        parts.append(text(left - 6, y + 12, name, "end"))
        x = float(left)
        for part, value in figures.items():
            parts.append(
                f'<rect class="part-{part}" x="{x:.1f}" y="{y}"'
                f' width="{value * scale:.1f}" height="{BAR}"><title>{escape(name)},'
                f" {escape(part)}: {value:.2f} {unit}</title></rect>"
            )
            x += value * scale
        parts.append(text(x + 5, y + 12, short(sum(figures.values())), "value"))
    return svg(title, height, parts)


def caption(title: str, unit: str, better: str) -> list[str]:
    """The title, and below it the unit and which figures are the good ones."""
    return [
        text(LEFT, 14, title, "title"),
        text(LEFT, 30, f"{unit}; {better} is better", "unit"),
    ]


def svg(title: str, height: float, parts: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def nice(value: float) -> float:
    """The end of an axis: not below the value, and easy to read in quarters."""
    if value <= 0:
        return 1.0
    power: float = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 8, 10) if step * power >= value)


def short(value: float) -> str:
    """A number in three digits."""
    for limit, divisor, suffix in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= limit:
            return f"{value / divisor:.3g}{suffix}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
