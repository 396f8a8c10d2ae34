# One virtual environment, pinned; every target works on a fresh clone.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.loom3d-stamp
NAME ?= features
OUT ?= $(HOME)/loom3d

export DS_ACCELERATOR ?= cpu

.PHONY: help setup demo demo-probe test test-slow check format bench learn clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, found %s; set PYTHON=python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(STAMP)  ## the virtual environment with pinned dependencies

demo: $(STAMP)  ## rooms -> encoder -> latent -> language and diffusion together (Ray) -> an imagined view; one page
	@$(BIN)/python -m infra.demo --root '$(OUT)'

demo-probe: $(STAMP)  ## rooms -> questions -> frozen features -> cache -> trained probe -> report
	@$(BIN)/loom3d data questions recipe=probe size=tiny data=rooms storage.root='$(OUT)' | sed -n 1p
	@$(BIN)/loom3d train recipe=probe size=tiny data=rooms name=demo storage.root='$(OUT)'

test: $(STAMP)  ## the test suite (minutes)
	@$(BIN)/python -m pytest -q $(ARGS)

test-slow: $(STAMP)  ## what takes longer: multi-node, job submission, fault matrices
	@$(BIN)/python -m pytest -q -m 'slow and not gpu' --timeout 1800 $(ARGS)

check: $(STAMP)  ## format, lint, types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(STAMP)  ## rewrite in the project's style
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(STAMP)  ## make bench NAME=features: one JSON line a figure
	@$(BIN)/python -m infra.bench.$(NAME) $(ARGS)

learn: $(STAMP)  ## make learn NAME=probe: the longer experiments behind the documents' figures
	@$(BIN)/python -m infra.learn.$(NAME) $(ARGS)

clean:  ## remove caches of tools (never data, runs or features)
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
