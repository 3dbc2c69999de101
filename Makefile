# make demo    the whole pipeline on the small model: data, two trainings, scores, report
# make test    everything that proves the project works (at most 15 minutes on 2 cores)
# make docs    the documentation as a site in build/docs (open build/docs/index.html)
# The rest: make lint | lab | export | mutants | docs-serve | clean. Each installs what it needs into .venv first.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test quick lint lab export docs docs-serve mutants install dev clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Nothing here downloads models or data; JupyterLab, in which you may want to, is as you set it.
OFFLINE_AS_SET := $(or $(HF_HUB_OFFLINE),0)
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PYTHONUNBUFFERED := 1

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

# --- environment: a stamp a set of extras, so that a second `make` installs nothing -------------
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: pyproject.toml | $(BIN)/python
	@echo "installing the package and what it needs into $(VENV): a few minutes, once"
	$(BIN)/python -m pip install -qq --editable '.[demo]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo "installing the package, the demo's and the developers' tools into $(VENV): a few minutes, once"
	$(BIN)/python -m pip install -qq --editable '.[demo,dev]'
	touch $@ $(VENV)/.installed-demo $(VENV)/.installed-lab

# What the tutorials need beside the demo: an API client for the fifth.
$(VENV)/.installed-lab: pyproject.toml | $(BIN)/python
	@echo "installing the package and what the notebooks need into $(VENV): a few minutes, once"
	$(BIN)/python -m pip install -qq --editable '.[demo,api]'
	touch $@ $(VENV)/.installed-demo

install: $(VENV)/.installed-demo
dev: $(VENV)/.installed-dev

# --- the two commands ---------------------------------------------------------------------------
demo: install
	$(BIN)/qwen2vl-sft demo

# One thread a process: two test workers with two threads each would thrash two cores.
test quick mutants: export OMP_NUM_THREADS := 1
test quick mutants: export MKL_NUM_THREADS := 1
test quick: export MPLBACKEND := Agg

# The library notebooks' examples, then pytest: structure (notebooks clean, package in sync, import
# order), edge cases, and the demo pipeline at reduced size through papermill.
test: dev
	$(BIN)/ruff check qwen2vl_sft tests docs
	$(BIN)/nbdev_test --n_workers 2 --timing
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --durations 25

# The same without what is marked slow.
quick: dev
	$(BIN)/ruff check qwen2vl_sft tests
	$(BIN)/python -m pytest -n 2 --dist loadscope -m 'not slow'

# --- for developers -----------------------------------------------------------------------------
lint: dev
	$(BIN)/ruff check qwen2vl_sft tests

lab: export HF_HUB_OFFLINE := $(OFFLINE_AS_SET)
lab: $(VENV)/.installed-lab
	$(BIN)/jupyter lab --notebook-dir=. $(if $(filter 0,$(shell id -u)),--allow-root)

# After editing a notebook: no outputs, no stray metadata, package in sync.
export: dev
	$(BIN)/python tests/notebooks.py clean
	$(BIN)/nbdev_export

# README, notebooks and docstrings as a site that needs no network; then every link is followed.
docs: dev
	$(BIN)/python docs/build.py build/docs
	$(BIN)/python docs/links.py build/docs

docs-serve: docs
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory build/docs 8000

# Break one line of the package at a time; the named test must turn red (tests/mutants.py).
mutants: dev
	$(BIN)/python tests/mutants.py

clean:
	rm -rf runs prepared build *.egg-info .pytest_cache .ruff_cache .hypothesis
