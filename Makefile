# make mnist: from nothing to the paper's figure.   make test: from nothing to the tests.
PYTHON ?= python3
BIN := .venv/bin
WORKDIR ?= runs/mnist-quick

.PHONY: mnist test test-slow check bench clean

mnist: .venv/installed
	$(BIN)/python launch.py --config=configs/mnist.py --workdir=$(WORKDIR)

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 -m "slow and not gpu"

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "torch==2.13.0"
	$(BIN)/python -m bench.mnist

.venv/installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv runs
