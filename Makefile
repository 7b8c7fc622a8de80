# make mnist: from nothing to the README's figure.   make test: from nothing to the tests.
PYTHON ?= python3
BIN := .venv/bin
WORKDIR ?= runs/mnist-quick

.PHONY: mnist theorem numbers test test-slow check bench docs parity preflight clean

mnist: .venv/installed
	$(BIN)/python launch.py --config=configs/mnist.py --workdir=$(WORKDIR)

theorem: .venv/installed
	$(BIN)/python launch.py --config=configs/theorem.py

numbers: .venv/installed
	$(BIN)/python launch.py --config=configs/numbers.py

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not gpu"

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed .venv-peers/installed
	$(BIN)/python -m bench.mnist --peer=.venv-peers/bin/python
	$(BIN)/python -m bench.lora --peer=.venv-peers/bin/python
	$(BIN)/python -m bench.sampling --peer=.venv-peers/bin/python

# Tables and figures of the docs, from the measurements in docs/results/.
docs: .venv/installed
	$(BIN)/python -m bench.docs

parity: .venv/installed-dev
	$(BIN)/python -m pytest -q tests/weights/test_families.py tests/weights/test_gguf.py --parity=docs/parity.md

.venv/installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

# Compiles steps for TPU pods and GPUs that are not there. Their compilers stay out of the environment, where jax would
# look for such devices at every start.
preflight: .compilers/installed
	PYTHONPATH=.compilers JAX_PLATFORMS=cpu $(BIN)/python -m bench.preflight
	PYTHONPATH=.compilers JAX_PLATFORMS=cpu $(BIN)/python -m bench.presets

.compilers/installed: .venv/installed
	version=$$($(BIN)/python -c "import jaxlib; print(jaxlib.__version__)"); \
	$(BIN)/pip install --quiet --no-deps --target .compilers libtpu jax-cuda12-pjrt==$$version \
		jax-cuda12-plugin==$$version nvidia-cuda-nvcc-cu12
	touch $@

# Peers have an environment of their own: each side is measured as its users have it.
.venv-peers/installed:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet numpy peft transformers "torch==2.13.0" xllamacpp gguf
	touch $@

clean:
	rm -rf .venv .venv-peers .compilers runs
