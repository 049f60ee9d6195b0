# Every verb works on a fresh clone: it makes the virtual environment it needs and brings it up to date.
PYTHON    ?= python3
VENV      ?= .venv
DEMO_DIR  ?= demo-run
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
WORKERS   ?= 2
PIP_FLAGS ?=

BIN  := $(VENV)/bin
BASE := $(VENV)/.installed-base
DEV  := $(VENV)/.installed-dev
# --no-compile: Python compiles what is imported, when it is imported; compiling all of torch first costs half a minute.
PIP  := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile $(PIP_FLAGS) -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo test lint type bench docs clean

help:  ## list these verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(BASE)  ## install mambalign into .venv (VENV=..., PYTHON=... to choose others)

setup-dev: $(DEV)

demo: $(BASE)  ## pre-train, SFT, DPO and compare a small Mamba from scratch; writes demo-run/report.html
	$(BIN)/mambalign demo --output-dir $(DEMO_DIR) $(DEMO_ARGS)

test: $(DEV)  ## run the tests (TEST_ARGS="-k packing" to choose)
	$(BIN)/python -m pytest -q -n $(WORKERS) --durations=15 $(TEST_ARGS)

lint: $(DEV)  ## ruff: rules and format (`ruff check --fix . && ruff format .` mends)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(DEV)  ## mypy over the package
	$(BIN)/mypy

bench: $(DEV)  ## forward+backward tokens/s, transformers' CPU path and ours side by side
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/cpu.py $(BENCH_ARGS)

docs: $(DEV)  ## check the documents and run their commands, build the handbook into build/site, run docstrings' examples
	$(BIN)/python docs/check.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python -m pytest -q --doctest-modules mambalign

clean:  ## remove the environment, caches and the demo's run
	rm -rf $(VENV) $(DEMO_DIR) build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mambalign needs Python 3.11 or newer; name one with PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)

$(BASE): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $@ $(BASE)
