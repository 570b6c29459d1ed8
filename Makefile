# Two promises: `make demo` and `make test` do everything on a fresh machine with
# Python 3.11 or later, make, gcc and pip. No root, no network beyond the package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint types imports tests benchmarks clean

demo: $(INSTALLED)
	$(BIN)/teachonce demo demo-out

test: lint types imports tests

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

imports: $(INSTALLED)
	$(BIN)/lint-imports

tests: $(INSTALLED)
	$(BIN)/python -m pytest

benchmarks: $(INSTALLED)
	$(BIN)/python benchmarks/precompute.py
	$(BIN)/python benchmarks/finished_job.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/write_block.py
	$(BIN)/python benchmarks/streaming.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/normalisation.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    -c constraints.txt -e ".[precompute,train,s3,dev]"
	touch $@

clean:
	rm -rf $(VENV) demo-out build dist *.egg-info
