# Two commands on a fresh machine: `make train` and `make test`. Everything happens inside .venv, data/ and runs/.
PYTHON ?= python3
BIN := .venv/bin
# Real photographs for the tests that use them; those tests skip where the folder is absent.
export FARL_DATA ?= $(wildcard $(CURDIR)/../shared/data)

.PHONY: train test test-full test-oldest bench lint clean

train: .venv/installed-train
	$(BIN)/python -m farl.faces --out data/quickstart
	$(BIN)/torchrun -m farl.train quickstart

test: .venv/installed-dev
	$(BIN)/python -m farl_kernels.aot --check --quiet
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow and not gpu' -n 2 --dist worksteal --durations 15

test-full: .venv/installed-dev
	$(BIN)/python -m farl_kernels.aot --check --quiet
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not gpu' -n 2 --dist worksteal --durations 30

# The ops with the oldest torch, triton and numpy that are supported, in an environment of their own.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m farl_kernels.aot --check --quiet
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest tests/kernels -m 'not slow and not gpu' -n 2 --dist worksteal

bench: .venv/installed-dev
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-columns=median,iqr --benchmark-sort=median

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

clean:
	rm -rf .venv .venv-oldest data runs

.venv/installed-train: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train]'
	touch $@

.venv/installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train,dev]'
	touch .venv/installed-train $@

.venv-oldest/installed: pyproject.toml
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[train,dev]' \
		'torch==2.11.*' 'triton==3.6.*' 'numpy==1.26.*'
	touch $@
