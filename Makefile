# Every target sets up what it needs: a virtual environment with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
INTEGRATIONS ?= .venv-integrations
BIN = $(VENV)/bin
ENVIRONMENT = $(VENV)/.installed
TYPED = build/typed/fastkd
# Each group is a process of its own, because Triton decides at import whether it interprets, and
# each target has an emulated GPU of its own, which executes what is compiled for it.
INTERPRETED = TRITON_INTERPRET=1 $(BIN)/pytest -q --ignore=tests/compiled --ignore=tests/integrations
COMPILED = $(BIN)/pytest -q tests/compiled
EMULATED = $(BIN)/pytest -q tests/test_contracts.py

.PHONY: demo test test-all test-integrations bench check types mutants counted exactness budgets docs ptx

demo: $(ENVIRONMENT)
	$(BIN)/fastkd demo

# What every change must pass, in about six minutes on two cores.
test: $(ENVIRONMENT)
	$(INTERPRETED) -n 2 -m "not full"
	$(COMPILED) -n 2 -m "not full"
	$(MAKE) --jobs 2 --output-sync quick-sm_90 quick-sm_80

quick-sm_80: SELECTED = -k "forward_kl or info_nce or rkd or hint"
quick-sm_%: $(ENVIRONMENT)
	PTX_TARGET=sm_$* $(EMULATED) -m "not full" $(SELECTED)

# Everything: all cases, all targets, the types, the site and the wheel.
test-all: $(ENVIRONMENT)
	$(INTERPRETED) -n 2
	$(COMPILED) -n 2
	PTX_TARGET=sm_90 $(EMULATED) -n 2 tests/test_kernels.py
	PTX_TARGET=sm_80 $(EMULATED) -n 2 tests/test_kernels.py

# The kernels alone, on the targets of TARGETS: what the emulated GPUs executed, and how long it took.
TARGETS ?= sm_80 sm_90
ptx: $(ENVIRONMENT)
	for target in $(TARGETS); do PTX_TARGET=$$target $(EMULATED) -n 2 tests/test_kernels.py || exit 1; done

# The frameworks live in an environment of their own: no other target needs them.
test-integrations: $(INTEGRATIONS)/.installed
	$(INTEGRATIONS)/bin/pytest -q tests/integrations

# Their losses are compared; some of them want torchvision, which is refused: hence --no-deps.
PEERS = lightly mmrazor nvidia-modelopt textbrewer timm torchdistill
# Vocabularies and what cuts a text by them; their other dependencies are of no use here.
PEERS += mistral-common sentencepiece tiktoken

# On a CPU, for example `make bench ARGUMENTS="--loss kd --threads 1"`; a GPU has gpu_run.py.
bench: $(ENVIRONMENT)
	$(BIN)/python benchmarks/bench.py $(ARGUMENTS)

# How far losses and gradients lie from published forms, and from the code of these libraries.
exactness: $(INTEGRATIONS)/.installed
	$(INTEGRATIONS)/bin/python -W ignore benchmarks/report.py exactness

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
