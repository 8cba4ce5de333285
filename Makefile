# One command each; every target sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Where this is set, each process compiles torch's sources again: 19 s to import it and torchvision instead of 7.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup bindings demo test test-all fuzz test-lowest check benchmark format clean

setup: $(STAMP)

# uv installs in seconds what pip takes minutes for; it comes from PyPI like everything else.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("d2zero needs Python 3.11 or newer, %s is %d.%d; try: make PYTHON=python3.12" % (sys.executable, *sys.version_info[:2]) if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'
	touch $@

# For the tests of engines: TensorRT-RTX, which builds them without a GPU, and TensorRT's names and signatures, which are
# Python bindings without the libraries. Two versions of those cannot share an environment, so each has a folder. Where
# they cannot be had, those tests skip.
bindings: $(VENV)/.tensorrt-rtx $(VENV)/tensorrt-10.14/.installed $(VENV)/tensorrt-11.4/.installed

$(VENV)/.tensorrt-rtx: $(STAMP)
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[tensorrt-rtx]' \
	  && touch $@ || echo 'no TensorRT-RTX for this machine: its tests are skipped'

$(VENV)/tensorrt-%/.installed: $(STAMP)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target $(@D) --no-deps 'tensorrt-cu13-bindings==$*.*' \
	  && touch $@ || echo 'no bindings of TensorRT $* for this machine: their tests are skipped'

demo: setup
	$(BIN)/d2zero demo

# Two tests at a time with a thread each; whoever is done takes from the other. `test` is what CI runs.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal
test: setup bindings
	$(PYTEST) -m 'not long'

# The long ones, too: before a release, and when what they test has changed.
test-all: setup bindings
	$(PYTEST) -m ''

# Damaged and hostile files, many more of them than `test` tries.
fuzz: setup
	FUZZ_CASES=3000 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 tests/fuzz

# The same with the lowest versions that pyproject.toml promises, in an environment of their own.
LOWEST ?= .venv-lowest
test-lowest: setup
	test -x $(LOWEST)/bin/python || $(BIN)/uv venv --quiet --python $(BIN)/python $(LOWEST)
	$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[dev]'
	OMP_NUM_THREADS=1 $(LOWEST)/bin/pytest -n 2 --dist worksteal -m ''

# Before a commit: lint, types, and the quick tests with a floor for their coverage.
check: setup bindings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy tests
	$(PYTEST) --cov --cov-report=term

# A table for this machine in minutes; RESULTS=benchmarks/results writes what the tables of docs/benchmarks.md are made from.
RESULTS ?= runs/benchmark
benchmark: setup
	$(BIN)/python benchmarks/studies/standard.py --output $(RESULTS)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(LOWEST) build dist demo-output runs
