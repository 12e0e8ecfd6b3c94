"""A small chart, drawn on the server: shapes and attributes that a strict content security policy allows."""

from __future__ import annotations

from collections.abc import Sequence

from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

#: Of the image, with room for the labels of its axes.
WIDTH, HEIGHT = 360, 100
#: Where the bars stand.
LEFT, TOP, BOTTOM = 44, 14, 78


def sparkline(values: Sequence[int], key: str, title: str, labels: Sequence[str], ends: tuple[str, str]) -> SafeString:
    """Return one bar for each value, the latest on the right, between axes that say how high and how long they are.

    Args:
        key: An id for the title that is unique on its page.
        title: What the chart says, for those who do not see it.
        labels: What each bar is, for those who point at it.
        ends: What stands below the first bar, and below the last one.
    """
    most = max([*values, 1])
    step = (WIDTH - LEFT) / max(len(values), 1)
    bars = [
        (
            f"{LEFT + number * step + 0.5:.1f}",
            f"{BOTTOM - max(value / most * (BOTTOM - TOP), 1.5):.1f}",
            f"{step - 1:.1f}",
            f"{max(value / most * (BOTTOM - TOP), 1.5):.1f}",
            f"{label}: {value:,}",
        )
        for number, (value, label) in enumerate(zip(values, labels, strict=True))
        if value
    ]
    lines = ((TOP, f"{most:,}"), (BOTTOM, "0"))
    return format_html(
        '<svg class="cd-spark" role="img" aria-labelledby="{key}" viewBox="0 0 {width} {height}" width="{width}" '
        'height="{height}"><title id="{key}">{title}</title>{lines}{bars}'
        '<text class="cd-spark__label" x="{left}" y="{below}">{first}</text>'
        '<text class="cd-spark__label" x="{width}" y="{below}" text-anchor="end">{last}</text></svg>',
        key=key,
        width=WIDTH,
        height=HEIGHT,
        title=title,
        left=LEFT,
        below=BOTTOM + 16,
        first=ends[0],
        last=ends[1],
        lines=format_html_join(
            "",
            '<line class="cd-spark__axis" x1="{0}" y1="{2}" x2="{1}" y2="{2}"></line>'
            '<text class="cd-spark__label" x="{3}" y="{4}" text-anchor="end">{5}</text>',
            ((LEFT, WIDTH, height, LEFT - 6, height + 4, text) for height, text in lines),
        ),
        bars=format_html_join("", '<rect x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>', bars),
    )
