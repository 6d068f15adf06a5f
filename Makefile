# Two commands for a newcomer: `make demo` and `make test`. Each creates what it needs and can be run again.
#   make check          format, lint, types, import contracts, line report (under a minute)
#   make test           every test that needs no accelerator
#   make demo           a real document, asked on this machine
#   make bar ROW=A3     one row of what must hold, measured; one JSON object on stdout
# PYTHON=python3.12 picks the interpreter; PIP_FLAGS goes to every `pip install` (an index of CPU-only wheels, say).

PYTHON ?= python3
PIP_FLAGS ?=
ROW ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
SOURCES := orchestrator sparse_attn kv_store collectives benchmarks tests $(wildcard examples)
# Tests never reach the network: the model is fetched before them.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help venv model check format test test-gpu demo bar clean

help:
	@sed -n '1,6s/^# \{0,1\}//p' Makefile

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(wildcard sparse_attn/native/*.[ch])
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; v = sys.version_info; \
	    sys.exit(v < (3, 11) and f"make venv: Python {v[0]}.{v[1]}; limit 3.11; run make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	@touch $@

model: $(STAMP)
	$(BIN)/longspan models fetch smollm2-135m

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(SOURCES)
	$(BIN)/lint-imports
	@$(BIN)/python -m benchmarks.lines

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: model
	$(OFFLINE) $(BIN)/python -m pytest -q $(ARGS)

test-gpu: $(STAMP)
	$(OFFLINE) $(BIN)/python -m pytest -q -m gpu $(ARGS)

demo: model
	$(BIN)/python examples/demo.py $(ARGS)

# Stdout is the row's JSON object alone, so what make itself does goes to stderr.
bar:
	@$(MAKE) --no-print-directory model 1>&2
	@$(BIN)/python -m benchmarks.bar $(ROW) $(ARGS)

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
