"""A small chart, drawn on the server: shapes and attributes that a strict content security policy allows."""

from __future__ import annotations

from collections.abc import Sequence

from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

WIDTH = 240
HEIGHT = 40


def sparkline(values: Sequence[int], key: str, title: str) -> SafeString:
    """Return one bar for each value, the latest on the right.

    Args:
        key: An id for the title that is unique on its page.
        title: What the chart says, for those who do not see it.
    """
    most = max([*values, 1])
    step = WIDTH / max(len(values), 1)
    bars = [
        (
            f"{number * step:.1f}",
            f"{HEIGHT - max(value / most * HEIGHT, 1.5):.1f}",
            f"{step - 1:.1f}",
            f"{max(value / most * HEIGHT, 1.5):.1f}",
        )
        for number, value in enumerate(values)
        if value
    ]
    return format_html(
        '<svg class="cd-spark" role="img" aria-labelledby="{key}" viewBox="0 0 {width} {height}" width="{width}" '
        'height="{height}"><title id="{key}">{title}</title>'
        '<line class="cd-spark__axis" x1="0" y1="{height}" x2="{width}" y2="{height}"></line>{bars}</svg>',
        key=key,
        width=WIDTH,
        height=HEIGHT,
        title=title,
        bars=format_html_join("", '<rect x="{}" y="{}" width="{}" height="{}"></rect>', bars),
    )
