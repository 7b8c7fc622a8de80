# make mnist: from nothing to the paper's figure.   make test: from nothing to the tests.
PYTHON ?= python3
BIN := .venv/bin
WORKDIR ?= runs/mnist-quick

.PHONY: mnist theorem numbers test test-slow check bench parity preflight clean

mnist: .venv/installed
	$(BIN)/python launch.py --config=configs/mnist.py --workdir=$(WORKDIR)

theorem: .venv/installed
	$(BIN)/python launch.py --config=configs/theorem.py

numbers: .venv/installed
	$(BIN)/python launch.py --config=configs/numbers.py

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 -m "slow and not gpu"

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed .venv-peers/installed
	$(BIN)/python -m bench.mnist --peer=.venv-peers/bin/python
	$(BIN)/python -m bench.lora --peer=.venv-peers/bin/python
	$(BIN)/python -m bench.sampling --peer=.venv-peers/bin/python

parity: .venv/installed-dev
	$(BIN)/python -m pytest -q tests/test_families.py --parity=docs/parity.md

.venv/installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

# Compiles steps for TPU pods that are not there; libtpu stays out of the default environment.
preflight: .venv/installed
	$(BIN)/pip install --quiet "jax[tpu]"
	JAX_PLATFORMS=cpu $(BIN)/python -m bench.preflight

# Peers have an environment of their own: each side is measured as its users have it.
.venv-peers/installed:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet numpy peft transformers "torch==2.13.0" xllamacpp gguf
	touch $@

clean:
	rm -rf .venv .venv-peers runs
