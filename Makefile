# Each target does its own set-up: Python 3.10 or newer and make are enough.
#   make demo    make test    make test-all    make bench    make clean
# Another interpreter: make demo PYTHON=python3.12     Another place: make demo VENV=/tmp/venv
# The set-up runs again when pyproject.toml or constraints.txt changed, or after `make clean`.

PYTHON ?= python3
VENV ?= .venv
# Set to nothing to run the tests in one process.
PYTEST_FLAGS ?= -n 2

.PHONY: demo test test-all bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.ready
	$(VENV)/bin/python -m graftwork demo

test: $(VENV)/.ready-test
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_FLAGS) -m 'not slow'

test-all: test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_FLAGS) -m slow

bench: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/bench.py
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/sweeps.py
	OMP_NUM_THREADS=2 $(VENV)/bin/python benchmarks/sweeps.py
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/lens.py
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/context.py
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/pruning.py

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit("graftwork needs Python 3.10 or newer, this is %d.%d; give another one with PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(VENV)/.ready: $(VENV)/.created pyproject.toml constraints.txt
	$(VENV)/bin/python -m pip install -c constraints.txt -e .
	touch $@

$(VENV)/.ready-test: $(VENV)/.created pyproject.toml constraints.txt
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/.ready

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
