# Two commands on a fresh machine with Python 3.11, pip and make:  make demo  runs the main job,  make test  the tests.

PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false

.PHONY: install bench-peers demo test test-all check up down status clean
.DEFAULT_GOAL := install

# The stamp is written last, so that an install cut off is done again.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,local,dev,examples]'
	touch $@

install: .venv/installed

# What the benchmarks in tests/benchmarks measure against. MosaicML Streaming pins older packages than ours: it gets a
# venv of its own, which sees this one's torch.
PURELIB := import sysconfig; print(sysconfig.get_path("purelib"))
bench-peers: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,local,dev,examples,bench]'
	$(PYTHON) -m venv .venv-bench
	$(BIN)/python -c '$(PURELIB)' > $$(.venv-bench/bin/python -c '$(PURELIB)')/main.pth
	.venv-bench/bin/python -m pip install --quiet mosaicml-streaming==0.13.0

demo: install
	$(BIN)/geostream demo

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A process for each core, up to four: the servers that tests start need room as well.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4

test: check
	$(PYTEST) -m 'not slow'

test-all: check
	$(PYTEST)

up: install
	$(BIN)/python -m infra.stack up

down: install
	$(BIN)/python -m infra.stack down

status: install
	$(BIN)/python -m infra.stack status

clean:
	rm -rf .venv .venv-bench .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
