# Every target makes .venv and installs into it by itself; a second run starts at once.
# PYTHON chooses the interpreter of a new .venv, ARGS is passed on: make serve ARGS="--port 9000", make test ARGS="-k state".
# pip's own settings (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL) choose the build of torch: a CPU build is far smaller and is enough.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := clients engine kernels server training
TYPING := build/typing/lattice_serve

.PHONY: serve test check bench clean

serve: $(VENV)/.installed
	$(BIN)/lattice serve $(ARGS)

bench: $(VENV)/.installed
	$(BIN)/lattice bench $(or $(ARGS),offline)

test: $(VENV)/.installed-dev
	$(BIN)/pytest $(ARGS)

check: $(VENV)/.installed-dev $(TYPING)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPING) tests $(wildcard benchmarks/*.py)

# Leaves .venv: it is slow to fetch again, and something may be running from it.
clean:
	rm -rf build dist lattice_serve.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(PACKAGES) tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev,proof]'
	touch $@

# The import namespace as a folder, for mypy.
$(TYPING): Makefile
	mkdir -p $@
	for package in $(PACKAGES); do ln -sfn ../../../$$package $@/$$package; done
	touch $@
