# `make demo` and `make test` do all of their own set-up; a second call reuses it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-for-tests
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 7 ? n + 1 : 8)))
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -rs --durations=25 --junitxml=build/tests.xml

PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps
# pip compiles one file after the other; here all cores do it, and hardly anything of what is left out is ever imported.
# Some packages carry templates that are no Python: those fail, and nothing is lost.
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/tests?/|/transformers/models/' $(VENV)/lib || true
# Hundreds of processes start in a test run, and a dozen in a training: what one has compiled serves the others, also
# where the image of a container says that nothing compiled be kept.
unexport PYTHONDONTWRITEBYTECODE

# Of a machine with a GPU, which has a PyTorch of its own.
GPU_PYTHON ?= python3

.PHONY: help setup demo test test-all test-slow lint docs bench gpu-check release-check clean
help:
	@echo "make demo   train the quickstart policy on this machine's CPU, end to end"
	@echo "make test   run the tests"
	@echo "make test-all   the slow ones too"
	@echo "make lint   format check, lint, import contract, type check"
	@echo "make docs   the documentation as a site, in build/site"
	@echo "make bench  the short form of every benchmark"
	@echo "make gpu-check   what a machine with one GPU can answer, in eight minutes (docs/gpu_check.md)"
	@echo "make release-check   wheel and sdist of the last commit, installed away from here, run the demo"
	@echo "make setup  only the virtual environment (the others call it)"

setup: $(STAMP)

# The lock is complete, so --no-deps installs exactly it: nothing that a package asks for beside it, no CUDA build.
$(STAMP): requirements/cpu.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --no-compile -r requirements/cpu.lock
	$(PIP_INSTALL) --no-build-isolation --editable .
	$(COMPILE)
	@touch $(STAMP)

$(TEST_STAMP): $(STAMP) requirements/test.lock
	$(PIP_INSTALL) --no-compile -r requirements/test.lock
	$(COMPILE)
	@touch $(TEST_STAMP)

demo: setup
	$(BIN)/polyturn train quickstart $(ARGS)

# One run of everything: a file is one worker's, and there are more workers than cores, since much of a test is waiting
# for processes that it started. build/tests.xml holds how long each took; the end of the output says what was skipped.
test: $(TEST_STAMP) lint
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(TEST_STAMP) lint
	$(PYTEST) $(ARGS)

test-slow: $(TEST_STAMP)
	$(PYTEST) -m slow $(ARGS)

lint: $(TEST_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tests/static_checks.py

docs: $(TEST_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(TEST_STAMP)
	@set -e; for program in benchmarks/*.py; do echo "== $$program"; $(BIN)/python $$program --short; done

gpu-check:
	PYTHONPATH=src:. $(GPU_PYTHON) -m benchmarks.gpu_check $(ARGS)

release-check: $(STAMP)
	$(BIN)/python tests/release_check.py $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info
