# `make demo` and `make test` each set up what they need first; a second run finds it in place.
# PYTHON names the interpreter that .venv is made with (3.11 or newer), JOBS is how many test files run side by side.

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NODE := tests/e2e/node
SOURCES := broker hibernation storage docs/examples
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench check lint types format tools lock clean

help:
	@echo "make demo    set up and start the demo chat on port 1999"
	@echo "make test    set up and run all tests (T=path or T='-k words' narrows them)"
	@echo "make bench   set up and run the benchmarks"
	@echo "make check   lint (ruff, flake8-async) and types (mypy strict); with -j2 side by side"
	@echo "make format  let ruff format and sort imports"
	@echo "make tools   install Chromium, nginx, openssl, strace and the Node packages of the tests (root, Debian)"
	@echo "make lock    resolve requirements*.txt anew"
	@echo "make clean   remove what the above made"

setup: $(STAMP)

$(STAMP): requirements-dev.txt pyproject.toml .ci/venv
	@PYTHON="$(PYTHON)" sh .ci/venv $(VENV)
	@echo "installing packages into $(VENV)"
	@$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements-dev.txt
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup
	$(BIN)/broker demo

# Files go to the workers by their names: sorted by how many tests they hold, the slowest would come last, alone.
test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(T)

bench: setup
	$(BIN)/python -m tests.benchmarks $(B)

check: lint types

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/flake8 $(SOURCES)

types: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tools:
	sh .ci/tools

lock: setup
	$(BIN)/python .ci/lock.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis $(NODE)/node_modules
	find broker hibernation storage tests docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
