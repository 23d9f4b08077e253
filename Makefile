# `make demo` and `make test` do all of their own set-up; a second call reuses it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-for-tests

.PHONY: help setup demo test lint bench clean
help:
	@echo "make demo   train the quickstart policy on this machine's CPU, end to end"
	@echo "make test   run the tests"
	@echo "make lint   format check, lint, import contract, type check"
	@echo "make bench  the short form of every benchmark"
	@echo "make setup  only the virtual environment (the others call it)"

setup: $(STAMP)

# The lock is complete, so --no-deps installs exactly it: nothing that a package asks for beside it, no CUDA build.
$(STAMP): requirements/cpu.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/cpu.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

$(TEST_STAMP): $(STAMP) requirements/test.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/test.lock
	@touch $(TEST_STAMP)

demo: setup
	$(BIN)/polyturn train quickstart $(ARGS)

# What is skipped is told at the end. Two at a time, but for those that start the whole stack and want both cores. pytest says 5 where ARGS leave none to run.
test: $(TEST_STAMP) lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not stack" -rs $(ARGS) || test $$? -eq 5
	$(BIN)/python -m pytest -m stack -rs $(ARGS) || test $$? -eq 5

lint: $(TEST_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tests/static_checks.py

bench: $(TEST_STAMP)
	@set -e; for program in benchmarks/*.py; do echo "== $$program"; $(BIN)/python $$program --short; done

clean:
	rm -rf $(VENV) build *.egg-info
