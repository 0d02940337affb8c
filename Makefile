# Two commands: `make quickstart` and `make test`. Each sets itself up in .venv; a second call starts at once.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PYTEST := -m pytest -q -n auto --dist loadfile
define ENVIRONMENT
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
  { echo "Python 3.11 or newer is needed; '$(PYTHON)' is not. Name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 2; }; \
  $(PYTHON) .ci/environment.py
endef

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow test-latest check install lock clean-venv

help:
	@echo "make quickstart   watch the shipped reasoner fail, be probed, be trained and repair itself (about 5 minutes)"
	@echo "make test         the tests (offline, CPU)"
	@echo "make test-slow    the tests that take minutes"
	@echo "make check        lint, format, types, tests: the same as continuous integration"
	@echo "make install      .venv alone, with the versions of requirements.lock; every command above does this first"
	@echo "make lock         requirements.lock from pyproject.toml; UPGRADE=\"NAME ...\" or UPGRADE=all takes newer versions"
	@echo "make test-latest  the tests with the newest versions the majors in pyproject.toml allow, in .venv-latest"
	@echo "make clean-venv   remove both environments"

quickstart: $(STAMP)
	@$(BIN)/neureasoner run quickstart

test: $(STAMP)
	$(BIN)/python $(PYTEST)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow --timeout=3600

test-latest:
	@$(ENVIRONMENT) latest
	.venv-latest/bin/python $(PYTEST)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .typecheck/neureasoner .ci/environment.py
	@$(MAKE) --no-print-directory test

install: $(STAMP)

lock:
	@$(ENVIRONMENT) lock $(UPGRADE)

clean-venv:
	rm -rf .venv .venv-latest

# The stamp holds the folder that the environment was finished for: none, another or half of one is (re)made.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif
$(STAMP): pyproject.toml requirements.lock
	@$(ENVIRONMENT) install
