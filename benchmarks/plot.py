"""Draw the results as an SVG: points on a logarithmic axis, a whisker from the lowest to the highest round."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from benchmarks.results import Figure, Results, number

WIDTH, LABEL, BAR, GAP, HEADING = 760, 150, 16, 5, 34
COLOURS = {"conductor": "#2f6f4f", "celery": "#9aa7b0"}
OTHER = "#c08a3e"


def svg(results: Results) -> str:
    """The picture: a panel for each figure, with its highest value at the right."""
    y = 10
    parts: list[str] = []
    for figure in results.figures.values():
        drawn, height = _panel(results, figure, y)
        parts += drawn
        y += height
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}"'
        ' font-family="system-ui, sans-serif" font-size="12">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>', *parts, "</svg>"]) + "\n"


def _panel(results: Results, figure: Figure, top: int) -> tuple[list[str], int]:
    found = [(system, summary) for system in results.systems() if (summary := results.summary(system, figure.key))]
    if not found:
        return [], 0
    values = [value for _, summary in found for value in (summary.low, summary.high)]
    scale = logarithmic(min(values), max(values), WIDTH - LABEL - 70)
    better = "more is better" if figure.higher_is_better else "less is better"
    title = f"{'Replay, ' if 'replay' in figure.key else ''}{figure.title}, {figure.unit}"
    parts = [
        f'<text x="8" y="{top + 18}" font-weight="600" fill="#1c2a33">{escape(title)}'
        f' <tspan font-weight="400" fill="#66757f">{better}, logarithmic</tspan></text>'
    ]
    y = top + HEADING - 6
    for system, summary in found:
        colour = COLOURS.get(system.partition("-")[0], OTHER)
        length, low, high = scale(summary.median), scale(summary.low), scale(summary.high)
        end = LABEL + max(length, high) + 10
        middle = y + BAR / 2
        parts += [
            f'<text x="{LABEL - 8}" y="{y + 12}" text-anchor="end" fill="#1c2a33">{escape(system)}</text>',
            f'<line x1="{LABEL}" x2="{WIDTH - 70}" y1="{middle}" y2="{middle}" stroke="#e3e8eb"/>',
            f'<line x1="{LABEL + low:.1f}" x2="{LABEL + high:.1f}" y1="{middle}" y2="{middle}" stroke="#1c2a33"/>',
            f'<circle cx="{LABEL + length:.1f}" cy="{middle}" r="5" fill="{colour}"/>',
            f'<text x="{end:.1f}" y="{y + 12}" fill="#1c2a33">{number(summary.median)}</text>',
        ]
        y += BAR + GAP
    return parts, y - top + 8


def logarithmic(low: float, high: float, width: float) -> Callable[[float], float]:
    """Return what turns a value into a place on the axis: the highest is at ``width``, the lowest near its begin."""
    bottom = math.log10(low) - 0.1 * max(math.log10(high) - math.log10(low), 0.3)
    span = math.log10(high) - bottom

    def length(value: float) -> float:
        return max(1.0, width * (math.log10(value) - bottom) / span)

    return length
