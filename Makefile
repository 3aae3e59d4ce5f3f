# The commands of the project. `make demo` and `make test` work on a fresh machine with Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO := runs/demo

FUZZ_RUNS ?= 5
MINUTES ?= 30
SEED ?= 0
FAULTS ?= 0
WORKERS ?= 2

.PHONY: help venv demo docs test fuzz mutants soak lint clean

help:  ## list these commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed; name one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 2; }
	@# asked for pip, not for python: an interrupted venv has the one without the other, and is made whole by a second go
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || \
	  { echo "$(VENV) could not be made; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@echo "Installing into $(VENV) ..."
	@# torch first and at its pin: without it pip would take a CUDA build of several GB for any dependent
	@{ $(PIP) install -q -c constraints.txt "$$(grep ^torch== constraints.txt)" && \
	   $(PIP) install -q -c constraints.txt -e '.[test]'; } || \
	  { echo "Installing into $(VENV) failed, for the reason above; run it again with: make venv" >&2; exit 2; }
	@touch $@

venv: $(STAMP)  ## make .venv and install the library in it

demo: venv  ## train a small model on real text on two processes, and prove that it equals one
	@rm -rf $(DEMO)
	@$(BIN)/lss train configs/tiny.toml --nproc 2 --out $(DEMO)
	@$(BIN)/lss check configs/tiny.toml --nproc 2
	@$(BIN)/lss report $(DEMO)

docs: venv  ## build the documentation as a site, build/docs/index.html
	@$(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/docs/index.html"

test: venv  ## run the whole suite, in WORKERS=2 processes
	@$(BIN)/python -m pytest -n $(WORKERS)

fuzz: venv  ## run the tests of drawn inputs with new draws, FUZZ_RUNS=5 times
	@for run in $$(seq $(FUZZ_RUNS)); do \
	  $(BIN)/python -m pytest --hypothesis-profile=fuzz -m 'not gpu and not multigpu' $$(grep -rl 'from hypothesis' tests --include='test_*.py') \
	    -k 'any or equals or random or drawn' || exit 1; done

mutants: venv  ## plant known faults and show that the suite catches each
	@WORKERS=$(WORKERS) $(BIN)/python tests/mutants/run.py

soak: venv  ## train under random faults for about MINUTES=30, or through FAULTS=200 of them; SEED=0 draws them
	@$(BIN)/python -m tests.faults.soak --minutes $(MINUTES) --faults $(FAULTS) --seed $(SEED)

lint: venv  ## ruff, import contracts, types
	@test -x $(BIN)/ruff -a -x $(BIN)/pyright -a -x $(BIN)/pre-commit || $(PIP) install -q -c constraints.txt -e '.[dev]'
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports
	@$(BIN)/pyright

clean:  ## remove .venv, the demo's run and caches; your own runs stay
	@rm -rf $(VENV) $(DEMO) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
