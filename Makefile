# Two commands on a fresh machine with Python 3.11, pip and make:  make demo  runs the main job,  make test  the tests.

PYTHON ?= python3
BIN := .venv/bin
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false

# `make up` and what it starts may download pretrained weights, unless your environment says HF_HUB_OFFLINE=1.
demo check docs test-fast test test-all: export HF_HUB_OFFLINE := 1

.PHONY: help install bench-peers demo week format check docs test-fast test test-all up down status clean
.DEFAULT_GOAL := install

help: ## Print this list.
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The stamp is written last, so that an install cut off is done again.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,local,dev,examples]'
	touch $@

install: .venv/installed ## Install geostream and its tools into .venv.

# What the benchmarks in tests/benchmarks measure against. MosaicML Streaming pins older packages than ours: it gets a
# venv of its own, which sees this one's torch.
PURELIB := import sysconfig; print(sysconfig.get_path("purelib"))
bench-peers: install ## Install what the benchmarks compare with.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,local,dev,examples,bench]'
	$(PYTHON) -m venv .venv-bench
	$(BIN)/python -c '$(PURELIB)' > $$(.venv-bench/bin/python -c '$(PURELIB)')/main.pth
	.venv-bench/bin/python -m pip install --quiet mosaicml-streaming==0.13.0

demo: install ## Run the whole loop on rendered cities; ends with a report.
	$(BIN)/geostream demo

week: install ## Play three weeks of operation on rendered cities; ends with a table.
	$(BIN)/python -m flows.week

format: install ## Format the code, and mend what the linter can mend.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: install ## Check types, lint and format.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install ## Build the documentation into site/.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# One process more than there are cores, because tests wait a quarter of their time; up to four.
PROCESSES := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 3 ? n + 1 : 4)))
PYTEST := $(BIN)/python -m pytest -n $(PROCESSES)

# Pure functions and what is quick beside them: a first answer while one works, not a verdict. Nothing here needs timm,
# whose import alone takes ten seconds of a slow core.
FAST := planning layout evaluation/test_metrics.py evaluation/test_ranks.py store/test_url.py mining/test_topk.py \
	reclustering/test_similarity_order.py sharding/test_order.py sharding/test_places.py \
	test_architecture.py test_arrays.py test_settings.py

test-fast: install ## Run the quick tests, which need no server.
	$(PYTEST) -m 'not slow and not server' $(addprefix tests/,$(FAST))

# Types, documentation and tests are checked side by side: tests wait a third of their time for servers and processes.
SIDE_BY_SIDE := $(MAKE) --no-print-directory --jobs 3 check docs

.PHONY: pytest pytest-all
pytest: install
	$(PYTEST) -m 'not slow'

pytest-all: install
	$(PYTEST)

test: install ## Run all checks and tests, but for those marked slow.
	$(SIDE_BY_SIDE) pytest

test-all: install ## Run all checks and tests.
	$(SIDE_BY_SIDE) pytest-all

up: install ## Start S3, Dask, Prefect and a worker on this machine, with all deployments.
	$(BIN)/python -m infra.stack up

down: install ## Stop what `make up` started; the data stay.
	$(BIN)/python -m infra.stack down

status: install ## Show what `make up` started.
	$(BIN)/python -m infra.stack status

clean: ## Remove the virtual environments and all caches.
	rm -rf .venv .venv-bench .mypy_cache .pytest_cache .ruff_cache .hypothesis site *.egg-info
