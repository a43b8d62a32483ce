# Two commands do all set-up: `make lab` opens the lab, `make test` checks it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_ALONE := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PIP := $(PIP_ALONE) -c constraints.txt
OLDEST := $(VENV)/oldest-transformers
NEWEST_PYTHON ?= python3.13
WORKERS ?= 2
# Each worker computes in one thread, or they wait for each other.
SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
PLAIN := $(VENV)/plain-install

.PHONY: lab test test-slow test-oldest test-install test-gpu lint chromium clean

lab: $(VENV)/.installed
	$(BIN)/adapmoe-lab lab notebooks

test: $(VENV)/.installed-tests chromium lint
	$(SIDE_BY_SIDE) -m "not slow and not gpu"

test-slow: $(VENV)/.installed-tests chromium
	$(SIDE_BY_SIDE) -m slow tests/test_drawn_inputs.py
	$(BIN)/python -m pytest -m "slow and not gpu" --ignore=tests/test_drawn_inputs.py

# The oldest transformers that is supported, laid over the tested one.
test-oldest: $(VENV)/.installed-tests
	test -d $(OLDEST) || $(PIP_ALONE) --no-deps --target $(OLDEST) transformers==5.17.0 "huggingface-hub<2"
	PYTHONPATH=$(OLDEST) $(SIDE_BY_SIDE) -m "not slow and not gpu" tests/models tests/engine

# The wheel as anybody installs it on the newest Python: all that it brings is the newest, but torch,
# whose tested release may be at hand.
test-install: $(VENV)/.installed-tests $(PLAIN)/.installed
	$(BIN)/python -m pytest tests/test_wheel.py -k newest_python

test-gpu: $(VENV)/.installed-tests
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.installed-tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python --warnings
	$(BIN)/lint-imports

# Browser tests use an installed Chromium; where it cannot be installed they are skipped and say so.
chromium:
	@command -v chromium || command -v chromium-browser || command -v google-chrome \
	  || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	       && apt-get update -qq && apt-get install -y -qq chromium; } \
	  || echo "No Chromium found and none could be installed: browser tests will be skipped."

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11"'
	$(PIP) -e .
	touch $@

$(VENV)/.installed-tests: $(VENV)/.installed
	$(PIP) -e ".[test]"
	touch $@

$(PLAIN)/.installed: pyproject.toml constraints.txt
	$(NEWEST_PYTHON) -m venv --clear $(PLAIN)
	$(PLAIN)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep ^torch== constraints.txt)" .
	touch $@

clean:
	rm -rf $(VENV) build dist
