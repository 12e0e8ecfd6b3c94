"""What axe-core finds on a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: In the dark, and in another theme, what depends on colours; the rest is the same page.
COLOURS = {"runOnly": {"type": "rule", "values": ["color-contrast", "link-in-text-block"]}}


def violations(page: Any, context: dict[str, Any], **options: Any) -> list[tuple[str, str, str]]:
    """Return the rule, the element and what is wrong with it, for each violation.

    Args:
        page: Which page.
        context: Which parts of it, as axe-core takes it.
        options: Others of axe-core.
    """
    import axe_playwright_python

    # axe-core itself comes with the package; it is Deque's, under the Mozilla Public License 2.0.
    page.evaluate(Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text())
    found = page.evaluate(f"axe.run({json.dumps(context)}, {json.dumps({'resultTypes': ['violations'], **options})})")
    return [
        (
            violation["id"],
            str(node["target"][0]),
            f"{node.get('failureSummary', '').splitlines()[1:2]} {node['html'][:160]}",
        )
        for violation in found["violations"]
        for node in violation["nodes"]
    ]
