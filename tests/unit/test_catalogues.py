"""The translations that the package comes with: complete, with every placeholder, and compiled."""

from __future__ import annotations

import ast
import gettext
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import django
import pytest
from django.conf import settings
from django.utils import translation
from django.utils.translation.template import templatize
from django.utils.translation.trans_real import CONTEXT_SEPARATOR

import conductor_app
from conductor_app.telling import words

PACKAGE = Path(conductor_app.__path__[0])
LOCALE = PACKAGE / "locale"
LANGUAGES = sorted(path.name for path in LOCALE.iterdir() if path.is_dir())

#: What stands for a value, what is markup, what somebody can type, and what is found by its name.
_KEPT = re.compile(r"%\(\w+\)[sd]|\{\w*\}|</?\w+>|manage\.py conductor \w+|\b(?:Child|Event)[A-Z]\w+\b|\w+_\w+")
_WHAT_LOOKS_UP = {"gettext", "gettext_lazy", "gettext_noop", "ngettext", "ngettext_lazy", "pgettext", "pgettext_lazy"}


@dataclass(frozen=True)
class Entry:
    """A message of a ``.po`` file."""

    context: str
    message: str
    plural: str
    translations: tuple[str, ...]
    flags: str

    @property
    def key(self) -> str:
        return f"{self.context}{CONTEXT_SEPARATOR}{self.message}" if self.context else self.message


def po(language: str) -> Path:
    return LOCALE / language / "LC_MESSAGES" / "django.po"


def entries(language: str) -> list[Entry]:
    """Read a ``.po`` file, without its header."""
    found = [_entry(block) for block in po(language).read_text("utf-8").strip().split("\n\n")]
    assert found[0].message == ""
    return found[1:]


def _entry(block: str) -> Entry:
    fields: dict[str, str] = {}
    flags, name = "", ""
    for line in block.splitlines():
        if line.startswith("#"):
            flags += line
            continue
        text = line
        if not line.startswith('"'):
            name, text = line.split(" ", 1)
            assert name not in fields, block
            fields[name] = ""
        fields[name] += ast.literal_eval(text)
    translations = tuple(text for name, text in sorted(fields.items()) if name.startswith("msgstr"))
    return Entry(fields.get("msgctxt", ""), fields["msgid"], fields.get("msgid_plural", ""), translations, flags)


def compiled(language: str) -> Any:
    with po(language).with_suffix(".mo").open("rb") as file:
        return gettext.GNUTranslations(file)


def messages_in(source: str) -> Iterator[str]:
    """Return every text that a module passes to gettext as it stands there, under whatever name it has imported it."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {
        alias.asname or alias.name: alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module == "django.utils.translation"
        for alias in node.names
        if alias.name in _WHAT_LOOKS_UP
    }
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            texts = [text.value for text in node.args if isinstance(text, ast.Constant) and isinstance(text.value, str)]
            if names[node.func.id].startswith("pgettext"):
                texts = [CONTEXT_SEPARATOR.join(texts)]
            yield from texts


def in_template(source: str) -> Iterator[str]:
    text = r"""u?('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
    for call, first, second in re.findall(rf"\b(n?p?gettext)\({text}(?:, {text})?", templatize(source)):
        texts = [ast.literal_eval(one) for one in (first, second) if one]
        yield from [CONTEXT_SEPARATOR.join(texts)] if call == "pgettext" else texts


def messages() -> set[str]:
    """Return every message of the package."""
    found = {text for path in PACKAGE.rglob("*.py") for text in messages_in(path.read_text("utf-8"))}
    templates = (PACKAGE / "templates").rglob("*.html")
    return found | {text for path in templates for text in in_template(path.read_text("utf-8"))}


def test_there_are_the_languages_that_the_documentation_names() -> None:
    assert LANGUAGES == ["de", "es"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_message_of_the_package_is_in_the_catalogue(language: str) -> None:
    """If not: ``make messages``, and translate what it adds."""
    found = messages()
    assert len(found) > 500
    known = {text for entry in entries(language) for text in (entry.key, entry.plural) if text}
    assert found - known == set()
    assert known - found == set()


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_message_has_a_translation_that_somebody_has_looked_at(language: str) -> None:
    assert [entry.message for entry in entries(language) if not all(entry.translations)] == []
    assert [entry.message for entry in entries(language) if "fuzzy" in entry.flags] == []
    forms = {len(entry.translations) for entry in entries(language) if entry.plural}
    assert forms == {int(re.findall(r"nplurals=(\d)", po(language).read_text("utf-8"))[0])}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_keeps_values_markup_commands_and_names_of_code(language: str) -> None:
    for entry in entries(language):
        for number, text in enumerate(entry.translations):
            source = entry.plural if number else entry.message
            assert sorted(_KEPT.findall(text)) == sorted(_KEPT.findall(source)), source
            assert text.count("%") == source.count("%"), source


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_ends_as_its_message_does(language: str) -> None:
    for entry in entries(language):
        for text in entry.translations:
            assert text.strip() == text
            assert (text[-1] in ".:") == (entry.message[-1] in ".:") or entry.message == "As of", entry.message


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_compiled_is_what_is_written(language: str) -> None:
    """If not: ``make messages``."""
    expected: dict[Any, str] = {}
    for entry in entries(language):
        if entry.plural:
            expected |= {(entry.key, number): text for number, text in enumerate(entry.translations)}
        else:
            expected[entry.key] = entry.translations[0]
    known = dict(compiled(language)._catalog)
    del known[""]
    assert known == expected


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_header_says_what_is_needed_and_nothing_that_changes_by_itself(language: str) -> None:
    header = po(language).read_text("utf-8").split("\n\n")[0]
    assert "#" not in header
    assert re.findall(r'^"([\w-]+):', header, re.MULTILINE) == [
        "Language",
        "MIME-Version",
        "Content-Type",
        "Content-Transfer-Encoding",
        "Plural-Forms",
    ]
    assert f'"Language: {language}\\n"' in header
    assert "#:" not in po(language).read_text("utf-8")


@pytest.mark.skipif(django.VERSION[:2] != (5, 2), reason="They follow the Django that requirements.txt pins.")
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_message_that_django_has_too_stays_as_django_says_it(language: str) -> None:
    """All catalogues of a project are one: a word of ours is said on all pages of its admin."""
    root = Path(django.__path__[0])
    ours = {entry.key: entry.translations[0] for entry in entries(language)}
    for place in ("conf", "contrib/admin", "contrib/auth", "contrib/contenttypes", "contrib/sessions"):
        with (root / place / "locale" / language / "LC_MESSAGES" / "django.mo").open("rb") as file:
            theirs: Any = gettext.GNUTranslations(file)
        common = {key: text for key, text in theirs._catalog.items() if key and key in ours}
        assert {key: ours[key] for key in common} == common


@pytest.mark.parametrize(
    ("language", "said"), [("de", "Versuch 2 von 4"), ("es", "intento 2 de 4"), ("en", "attempt 2 of 4")]
)
def test_django_finds_the_catalogues(language: str, said: str) -> None:
    assert language in dict(settings.LANGUAGES)
    with translation.override(language):
        assert words.attempt_of(2, 4) == said
