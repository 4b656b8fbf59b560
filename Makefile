# Everything sets itself up in .venv first; nothing is installed outside it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo

# Spinning OpenMP threads cost more than they bring when several processes share the cores.
export OMP_WAIT_POLICY := passive

.PHONY: help setup demo test check format proto bench clean

help: ## what there is to make
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(VENV)/ready ## a virtual environment with fedmerge and everything its tests need

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup ## four sites, seven tasks, three rules; ends with a report in runs/demo
	$(BIN)/fedmerge simulate --out $(OUT) $(ARGS)

test: setup ## the whole test suite
	$(BIN)/pytest

check: setup ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy common client server protos deploy

format: setup ## formats the code and sorts imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: setup ## the code generated from protos/fedmerge/v1/aggregator.proto
	$(BIN)/python -m fedmerge.protos.regenerate

bench: setup ## OPCM against the published step
	$(BIN)/fedmerge bench opcm

clean: ## removes what these commands made, the virtual environment too
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
