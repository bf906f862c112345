# Two commands do everything on a fresh machine: `make fuzz` and `make test`.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin

.PHONY: fuzz test test-all recall lint clean

fuzz: $(VENV)/.installed  ## generated PPO cases on megatron-core, judged by laws (within 5 minutes on 2 cores)
	$(BIN)/pytest fuzz/ $(ARGS)

test: $(VENV)/.installed  ## the tests of the fuzzer itself (some 11 minutes on 2 cores)
	$(BIN)/pytest tests/ -m "not slow" $(ARGS)

test-all: $(VENV)/.installed
	$(BIN)/pytest tests/ $(ARGS)

recall: $(VENV)/.installed  ## every planted bug: is it found within 60 s, and shrunk to its smallest layout?
	$(BIN)/python -m fuzz recall $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# torch is pinned and installed first: an open range would take a build with several GB of CUDA packages.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .fuzz .hypothesis .pytest_cache .mypy_cache .ruff_cache *.egg-info
