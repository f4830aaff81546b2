# Every target sets up what it needs: a virtual environment with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
INTEGRATIONS ?= .venv-integrations
BIN = $(VENV)/bin
ENVIRONMENT = $(VENV)/.installed
INTERPRETED = --ignore=tests/compiled --ignore=tests/integrations

.PHONY: demo test test-all check bench mutants budgets test-integrations

demo: $(ENVIRONMENT)
	$(BIN)/fastkd demo

# What every change must pass, in minutes: see the marker `full` in pyproject.toml. The interpreter
# decides at import, so that the kernels are run and compiled in two processes.
test: $(ENVIRONMENT)
	TRITON_INTERPRET=1 $(BIN)/pytest -q -n 2 -m "not full" $(INTERPRETED)
	$(BIN)/pytest -q -n 2 -m "not full" tests/compiled

# Everything, and the kernels for all targets.
test-all: $(ENVIRONMENT)
	TRITON_INTERPRET=1 $(BIN)/pytest -q -n 2 $(INTERPRETED)
	$(BIN)/pytest -q -n 2 tests/compiled

# The frameworks live in an environment of their own: no other target needs them.
test-integrations: $(INTEGRATIONS)/.installed
	$(INTEGRATIONS)/bin/pytest -q tests/integrations

# On a CPU, for example `make bench ARGUMENTS="--loss kd --threads 1"`; a GPU has gpu_run.py.
bench: $(ENVIRONMENT)
	$(BIN)/python benchmarks/bench.py $(ARGUMENTS)

# What differs from tests/budgets.json; `python tests/budgets.py --write` records it.
budgets: $(ENVIRONMENT)
	$(BIN)/python tests/budgets.py

mutants: $(ENVIRONMENT)
	$(BIN)/python tests/mutants.py

check: $(ENVIRONMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(ENVIRONMENT): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[demo,bench,dev]"
	touch $@

$(INTEGRATIONS)/.installed: pyproject.toml constraints-integrations.txt
	$(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-integrations.txt --editable ".[integrations]"
	touch $@
