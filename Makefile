# Two commands: `make quickstart` and `make test`. Each sets itself up in .venv; a second call starts at once.
PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow check install clean-venv

help:
	@echo "make quickstart   watch the shipped reasoner fail, be probed, be trained and repair itself (about 5 minutes)"
	@echo "make test         the tests (offline, CPU)"
	@echo "make test-slow    the tests that take minutes"
	@echo "make check        lint, format, types, tests: the same as continuous integration"

quickstart: .venv/.installed
	@$(BIN)/neureasoner run quickstart

test: .venv/.installed
	$(BIN)/python -m pytest -q -n auto --dist loadfile

test-slow: .venv/.installed
	$(BIN)/python -m pytest -q -m slow --timeout=3600

check: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .typecheck/neureasoner
	@$(MAKE) --no-print-directory test

install: .venv/.installed

clean-venv:
	rm -rf .venv

# uv picks the PyTorch build (CPU or CUDA) for this machine from PyTorch's own index. Where that index or uv cannot be
# had, pip takes the pinned build of whatever index is configured; on Linux with a GPU that is the CUDA one.
.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed; '$(PYTHON)' is not. Name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo "Setting up .venv (once; a few minutes)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv || echo "uv cannot be had; using pip"
	@VIRTUAL_ENV="$(CURDIR)/.venv" $(BIN)/uv pip install --torch-backend=auto -e ".[dev]" 2>.venv/uv.log || \
	  { echo "uv could not choose a PyTorch build; installing $(TORCH) with pip"; \
	    $(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH) && \
	    $(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev]"; }
	@touch $@
