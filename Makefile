# serve: the demo model on 127.0.0.1:8000    test, test-slow: the suite    lint: style, types, layers
# Everything runs in .venv, which is made when it is missing and updated when its inputs change.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients
MODEL ?= demo-moe
ARGS ?=

# The first Python that is new enough and can make environments. PYTHON=... overrides it.
FIND_PYTHON := for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  && { command -v $$p; break; }; done
PYTHON ?= $(shell $(FIND_PYTHON))

# Halves of the list, so that what a file's tests share is made once; who is done first helps the other.
SPREAD := -n 2 --dist worksteal
INPUTS := pyproject.toml constraints.txt setup.py \
  $(wildcard octavo/kernels/cpu/*.cpp octavo/kernels/cpu/*.h)
PIP := $(BIN)/python -m pip --disable-pip-version-check
# On Linux PyPI's torch brings CUDA along; the CPU's is a tenth of the size, where this is reachable:
# make serve TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PIP_INSTALL := $(PIP) install -q -c constraints.txt $(addprefix --extra-index-url ,$(TORCH_INDEX))

# Whatever the shell says: every process of the tests would compile all it imports anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help serve test test-slow test-gpu lint style bench docs clients image-check clean

# Without a target: serve, which is the first one.
serve: $(VENV)/.installed
	$(BIN)/octavo serve $(MODEL) $(ARGS)

help:
	@echo 'make serve     the demo model on http://127.0.0.1:8000 (MODEL=..., ARGS="--port 80")'
	@echo 'make test      the test suite, with all set-up, but for what is marked slow'
	@echo 'make test-slow the rest of it: soaks, and programs of others that are large'
	@echo 'make test-gpu  what a GPU changes, on a machine that has one'
	@echo 'make lint      style, types, layers'
	@echo 'make bench     the figures of README.md, as JSON lines in bench.jsonl'
	@echo 'make clients   chat, stream, tools and data through the frameworks of applications'
	@echo 'make image-check  the Dockerfile, built and used, without a container engine (root, minutes)'
	@echo 'make docs      the pages that are made of the code and of figures'
	@echo 'make clean     remove .venv and all that was built'
	@echo 'The command is .venv/bin/octavo; PYTHON=... and TORCH_INDEX=... choose Python and torch.'

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(SPREAD) -m "not slow" $(ARGS)

# Soaks, and programs of others that are large.
test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(SPREAD) -m slow $(ARGS)

# What a GPU changes, on a machine that has one.
test-gpu: $(VENV)/.installed-dev
	PYTHON=$(BIN)/python benchmarks/gpu_suite.sh $(ARGS)

# What no test says, and the tests that are as quick.
lint: style
	$(BIN)/python -m pytest tests/test_architecture.py tests/test_options.py tests/test_public_api.py

style: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright

# The figures of README.md, as JSON lines in bench.jsonl.
bench: $(VENV)/.installed-dev
	OCTAVO=$(BIN)/octavo benchmarks/figures.sh bench.jsonl

# What docs/*.md and README.md say of options, routes, fields, metrics and figures, from the code and
# docs/figures; tests fail when it is old.
docs: $(VENV)/.installed
	$(BIN)/python -m docs.make_cells
	$(BIN)/python -m docs.make_cli
	$(BIN)/python -m docs.make_figures
	$(BIN)/python -m docs.make_reference

# What the frameworks of applications make of a server; they have an environment of their own.
clients: $(VENV)/.installed $(CLIENTS)/.installed
	$(CLIENTS)/bin/python benchmarks/clients.py --octavo $(BIN)/octavo $(ARGS)

# The Dockerfile's steps on a base of Debian's packages, and the image as it is run: read-only, not as root.
image-check: $(BIN)/python
	$(BIN)/python -m tests.deploy.image_check $(ARGS)

clean:
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find octavo -name '*.so' -delete
	find octavo tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with venv is needed (on Debian and" \
	  "Ubuntu: apt install python3-venv), or say which: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(CLIENTS)/.installed: Makefile | $(BIN)/python
	@echo "installing the frameworks into $(CLIENTS) (once) ..."
	@$(BIN)/python -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip --disable-pip-version-check install -q \
	  langchain-openai litellm llama-index-llms-openai-like instructor
	@touch $@

$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	@echo "installing octavo into $(VENV) (once; minutes if torch must be fetched) ..."
	@$(PIP_INSTALL) -e .
	@echo "installed: $(BIN)/octavo"
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	@echo "installing octavo and its tests' packages into $(VENV) (once) ..."
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed
