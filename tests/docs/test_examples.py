"""Every example of README and docs runs, and shows what it says."""

from __future__ import annotations

import ast
import configparser
import re
import shlex
import tomllib
from importlib import import_module
from typing import Any

import pytest
from celery.app import defaults
from celery.bin.celery import celery as celery_command
from django.conf import global_settings
from django.core.management import CommandError, get_commands, load_command_class

from conductor_app.conf import ConductorSettings
from project.settings import DATABASE_OPTIONS
from tests.docs.pages import LANGUAGES, ROOT, Block, blocks, commands, pages, read
from tests.docs.session import session

CELERY_SETTINGS = {name.upper() for name, _ in defaults.flatten(defaults.NAMESPACES)}
#: Read by Celery's Django fixup under its full name, and missing in Celery's table.
CELERY_SETTINGS.add("DB_REUSE_MAX")
#: Commands of the reader's machine.
SHELL = {"cat", "cd", "curl", "git", "kill", "ls", "mkdir", "pip", "psql", "sudo", "systemctl", "tail"}

#: Followed in a project of its own, by `test_getting_started`.
FOLLOWED = "docs/tutorial.md"
EXAMPLES = [
    page
    for page in pages()
    if page != FOLLOWED and any(block.language in ("python", "pycon") for block in blocks(page))
]
CONSOLES = [page for page in pages() if any(block.language == "console" for block in blocks(page))]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("page", EXAMPLES)
def test_the_examples_of_a_page_run_and_show_what_it_says(page: str) -> None:
    with session() as run:
        for block in blocks(page):
            if block.language == "python" and block.not_run:
                ast.parse(block.text, str(block))
            elif block.language == "python" and block.is_settings:
                check_settings(block)
            elif block.language in ("python", "pycon") and not block.not_run:
                run.run(block)


def check_settings(block: Block) -> None:
    """Run a block of settings, and look for names that nobody reads."""
    values: dict[str, Any] = {"BASE_DIR": ROOT, "INSTALLED_APPS": [], "LOGGING": {}}
    exec(compile(block.text, str(block), "exec"), values)
    names = [name for name in values if name.isupper()]
    if "CONDUCTOR" in values:
        ConductorSettings.from_dict(values["CONDUCTOR"])
    for name in names:
        if name.startswith("CELERY_"):
            assert name.removeprefix("CELERY_") in CELERY_SETTINGS, f"{block}: Celery has no setting {name}"
        else:
            assert hasattr(global_settings, name) or name in ("CONDUCTOR", "BASE_DIR"), f"{block}: who reads {name}?"
    for database in values.get("DATABASES", {}).values():
        expected = DATABASE_OPTIONS.get(database["ENGINE"])
        if "OPTIONS" in database and expected:
            # Those of PostgreSQL stand in several blocks, each with a reason of its own.
            shown = {name: value for name, value in database["OPTIONS"].items() if name in expected}
            wanted = {name: expected[name] for name in shown} if "postgresql" in database["ENGINE"] else expected
            assert shown == wanted, f"{block}: these are not the options that the project runs with"
    for app in values["INSTALLED_APPS"]:
        assert app == "shop" or import_module(app), f"{block}: {app}"


@pytest.mark.parametrize("page", pages())
def test_each_block_says_what_it_is(page: str) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block}: {block.language!r} is none of {sorted(LANGUAGES)}"
        if block.language == "ini":
            configparser.ConfigParser(strict=False, interpolation=None).read_string(block.text)
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "cron":
            for line in block.text.splitlines():
                command = line.split(None, 5)[5].replace(".venv/bin/python", "python")
                for part in re.split(r" && | \| ", command):
                    check_command(part, str(block))


@pytest.mark.parametrize("page", CONSOLES)
def test_each_command_exists_with_its_options(page: str) -> None:
    for block in blocks(page):
        if block.language == "console":
            for command, _output in commands(block):
                for part in re.split(r" && | \| ", command):
                    check_command(part, str(block))


def check_command(command: str, where: str) -> None:
    words = shlex.split(command, comments=True)
    while words and "=" in words[0] and words[0].split("=")[0].isupper():
        words.pop(0)
    if words[0] == "make":
        for target in words[1:]:
            assert "=" in target or f"\n{target}:" in read("Makefile"), f"{where}: no target {target}"
    elif words[:2] == ["python", "manage.py"]:
        check_management_command(words[2:], where)
    elif words[0] == "celery":
        check_celery_command(words[1:], where)
    elif words[:2] == ["django-admin", "startproject"] or words[:3] == ["python", "-m", "venv"]:
        pass
    elif words[:3] == ["python", "-m", "project.demo"]:
        assert all(word in read("project/demo/__main__.py") for word in words[3:] if word.startswith("-")), where
    else:
        assert words[0].removeprefix(".venv/bin/") in SHELL, f"{where}: {words[0]} is not known"


def check_management_command(words: list[str], where: str) -> None:
    name, *arguments = words
    app = get_commands().get(name)
    assert app, f"{where}: no command {name}"
    if name == "conductor":
        command = load_command_class(app, name) if isinstance(app, str) else app
        try:
            command.create_parser("manage.py", name).parse_args(arguments)
        except (CommandError, SystemExit) as error:
            raise AssertionError(f"{where}: {' '.join(words)}: {error}") from error


def check_celery_command(words: list[str], where: str) -> None:
    assert words[0] == "-A", where
    name, *arguments = words[2:]
    command: Any = celery_command.commands.get(name)
    assert command is not None, f"{where}: celery has no command {name}"
    if name == "worker":
        context = command.context_class(command, info_name=name)
        command.make_parser(context).parse_args(arguments)


@pytest.mark.parametrize("page", pages())
def test_each_example_that_is_not_run_says_why(page: str) -> None:
    for block in blocks(page):
        if block.not_run:
            assert len(block.not_run) > 10, f"{block}: {block.not_run!r} is no reason"
