# Every target sets up what it needs: a virtual environment with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
INTEGRATIONS ?= .venv-integrations
BIN = $(VENV)/bin
ENVIRONMENT = $(VENV)/.installed
TYPED = build/typed/fastkd
# Each group is one process, because the interpreter decides at import and two cores run two groups.
INTERPRETED = TRITON_INTERPRET=1 $(BIN)/pytest -q --ignore=tests/compiled --ignore=tests/integrations
COMPILED = $(BIN)/pytest -q tests/compiled

.PHONY: demo test test-all test-integrations bench check types mutants counted budgets docs

demo: $(ENVIRONMENT)
	$(BIN)/fastkd demo

# What every change must pass, in about four minutes on two cores.
test: $(ENVIRONMENT)
	$(INTERPRETED) -n 2 -m "not full"
	$(COMPILED) -n 2 -m "not full"

# Everything: all cases, all targets, the types, the site and the wheel.
test-all: $(ENVIRONMENT)
	$(INTERPRETED) -n 2
	$(COMPILED) -n 2

# The frameworks live in an environment of their own: no other target needs them.
test-integrations: $(INTEGRATIONS)/.installed
	$(INTEGRATIONS)/bin/pytest -q tests/integrations

# Their losses are compared; three of them want torchvision, which is refused: hence --no-deps.
PEERS = lightly textbrewer timm torchdistill

# On a CPU, for example `make bench ARGUMENTS="--loss kd --threads 1"`; a GPU has gpu_run.py.
bench: $(ENVIRONMENT)
	$(BIN)/python benchmarks/bench.py $(ARGUMENTS)

counted: $(ENVIRONMENT)
	$(BIN)/python benchmarks/report.py counted

# What differs from tests/budgets.json; `python tests/budgets.py --write` records it.
budgets: $(ENVIRONMENT)
	$(BIN)/python tests/budgets.py

mutants: $(ENVIRONMENT)
	$(BIN)/python tests/mutants.py

# The site, without network, into site/; a warning is an error.
docs: $(ENVIRONMENT)
	$(BIN)/python docs/build.py

check: $(ENVIRONMENT) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# kernels/ is installed as fastkd.kernels, and links show it to mypy in that place.
types: $(ENVIRONMENT)
	rm -rf $(TYPED) && mkdir -p $(TYPED)
	ln -sfn $(CURDIR)/fastkd/* $(TYPED)/
	ln -sfn $(CURDIR)/kernels $(TYPED)/
	cd $(TYPED)/.. && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p fastkd

$(ENVIRONMENT): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[demo,dev,docs]"
	touch $@

$(INTEGRATIONS)/.installed: pyproject.toml constraints-integrations.txt
	$(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-integrations.txt --editable ".[integrations]"
	$(INTEGRATIONS)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-integrations.txt --no-deps $(PEERS)
	touch $@
