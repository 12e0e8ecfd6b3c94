"""The tree of executions as a list of tags: a template that called itself would end at a hundred levels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from conductor_app.telling.tree import Branch

#: Levels of the tree that are open at first; further ones open with a click, except on the way to the execution.
OPEN_LEVELS = 3


@dataclass(frozen=True)
class Item:
    """One piece of a nested list.

    ``leaf`` is an entry without children; ``branch`` opens an entry with its list and ``end`` closes both; ``fold`` and
    ``end fold`` do so for one that can be folded; ``more`` is the entry that stands for those that are left out.
    """

    tag: str
    branch: Branch
    is_open: bool = True


def items(root: Branch) -> Iterator[Item]:
    """Yield the pieces of the list in which ``root`` is the only entry, in the order in which they are written."""
    to_write: list[Item | Branch] = [root]
    while to_write:
        piece = to_write.pop()
        if isinstance(piece, Item):
            yield piece
            continue
        if not piece.children and not piece.hidden:
            yield Item("leaf", piece)
            continue
        is_folded = piece.depth >= OPEN_LEVELS - 1
        yield Item("fold" if is_folded else "branch", piece, is_open=piece.is_on_path)
        to_write.append(Item("end fold" if is_folded else "end", piece))
        if piece.hidden:
            to_write.append(Item("more", piece))
        to_write.extend(reversed(piece.children))
