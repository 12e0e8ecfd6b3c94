# `make` alone lists the targets. Each one creates what it needs; Python 3.11 or newer is enough to start.

SHELL := /bin/sh
VENV := .venv
PYTHON := $(VENV)/bin/python
# More pytest arguments: make test ARGS="-k invoke", or in one process: make test ARGS="-n0 -s"
ARGS ?=
# Less of make test-matrix: CORNERS=--quick, or CORNERS="--only python3.12-django-6.0-celery-5.7"
CORNERS ?=
# How long make soak takes.
HOURS ?= 2
# A test that waits for a worker leaves its core to another one; more than four are in each other's way.
PARALLEL := -n 4 --dist=worksteal
# The first Python on PATH that is new enough and can make a virtual environment, unless one is given: make demo BASE_PYTHON=...
BASE_PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	"$$python" -c 'import ensurepip, sqlite3, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo "$$python"; break; }; done)
PIP_INSTALL := $(PYTHON) -m pip install -qq --disable-pip-version-check

.PHONY: help install demo test test-services test-matrix test-browser chaos soak mutants bench bench-page messages check clean
.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/installed ## Create .venv and install requirements.txt

$(VENV)/installed: requirements.txt requirements/common.txt
	@test -n "$(BASE_PYTHON)" || { echo "Python 3.11 or newer, with venv and sqlite3, is needed and was not found on PATH." >&2; exit 1; }
	@echo "Installing requirements.txt into $(VENV) ..."
	@$(BASE_PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) -r requirements.txt
	@touch $@

$(VENV)/installed-services: requirements-services.txt $(VENV)/installed
	@echo "Installing requirements-services.txt into $(VENV) ..."
	@$(PIP_INSTALL) -r requirements-services.txt
	@touch $@

$(VENV)/installed-browser: requirements-browser.txt $(VENV)/installed
	@echo "Installing requirements-browser.txt into $(VENV) ..."
	@$(PIP_INSTALL) -r requirements-browser.txt
	@touch $@

demo: install ## Run the demo: parents that wait for children without a worker
	@$(PYTHON) -m project.demo

test: install ## Run the tests on the embedded default: SQLite and no broker
	$(PYTHON) -m pytest $(PARALLEL) $(ARGS)

test-services: $(VENV)/installed-services ## Run the tests on each database and broker server
	$(PYTHON) -m tests.services -- $(PARALLEL) $(ARGS)

test-matrix: $(VENV)/installed-services ## Run the tests on the other versions of Python, Django and Celery
	$(PYTHON) -m tests.matrix $(CORNERS) -- $(PARALLEL) $(ARGS)

test-browser: $(VENV)/installed-browser ## Look at the admin with Chromium, and click through it
	@tests/browser/install
	$(PYTHON) -m pytest tests/browser -n 2 --dist=worksteal $(ARGS)

chaos: $(VENV)/installed-services ## Kill workers and servers under load for three minutes, and check what comes out
	$(PYTHON) -m tests.chaos --roots=1000 --seconds=180 $(ARGS)

soak: $(VENV)/installed-services ## The same for hours: make soak HOURS=2
	$(PYTHON) -m tests.chaos --hours=$(HOURS) $(ARGS)

mutants: $(VENV)/installed-services ## Take the guards out one by one: some test has to notice each time
	$(PYTHON) -m tests.mutants $(ARGS)

bench: $(VENV)/installed-services ## Measure: make bench ARGS="--peers" for DBOS, Absurd and Procrastinate too
	@$(PYTHON) -m benchmarks $(ARGS)

bench-page: $(VENV)/installed-services ## Write what was measured last into docs/explanation/performance.md
	@$(PYTHON) -m benchmarks.page $(ARGS)

messages: install ## Update and compile the translations (GNU gettext is needed)
	@cd conductor_app && ../$(VENV)/bin/django-admin makemessages --all --no-location --no-obsolete
	@sed -i.bak -e '/^"POT-Creation-Date:/d' -e '/^"Report-Msgid-Bugs-To:/d' conductor_app/locale/*/LC_MESSAGES/django.po
	@rm -f conductor_app/locale/*/LC_MESSAGES/django.po.bak
	@cd conductor_app && ../$(VENV)/bin/django-admin compilemessages

check: install ## Lint, format, types, layers, migrations, Django's checks
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache --no-logo
	$(PYTHON) manage.py makemigrations --check --dry-run --settings=tests.settings
	$(PYTHON) manage.py check

clean: ## Remove .venv, caches, and the demo and the matrix in var
	rm -rf $(VENV) var build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
