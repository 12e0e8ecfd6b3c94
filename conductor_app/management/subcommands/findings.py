"""What ``conductor doctor`` finds, line by line."""

from __future__ import annotations

from dataclasses import dataclass

from conductor_app.telling.words import clean


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, whether it is well, and what to do if not."""

    name: str
    #: ``OK``, ``WARN`` or ``FAIL``.
    level: str
    message: str
    hint: str = ""
    #: Whether it needs a person although it is no more than a warning: by itself it does not get well.
    needs_person: bool = False

    @property
    def is_well(self) -> bool:
        """Whether what comes after it can rely on it."""
        return self.level != "FAIL"


def line(error: BaseException) -> str:
    """Return an error as one line."""
    text = str(error).strip() or type(error).__name__
    return clean(text.splitlines()[0])
