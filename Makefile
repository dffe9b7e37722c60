# make help lists what there is. Everything runs in .venv, which `make setup` makes and which is remade by deleting it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2
# A file's tests stay together, and with them what its fixtures make.
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile
INSTALL := pip install --constraint constraints.txt --editable '.[dev]'
# Their requirements do not fit the rest and are not needed: see pyproject.toml.
WITHOUT_DEPS := torchattacks imagecorruptions-imaug

.DEFAULT_GOAL := help
.PHONY: help setup demo docs test test-slow lint bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv (PYTHON=python3.13 chooses the Python) and install the tested versions
	@echo "ready: $$($(BIN)/python --version) in $(VENV)"

# The stamp comes last: an interrupted installation is taken up again by the next call.
# uv is ten times faster than pip and is used if pip can get it; it reads no pip.conf, so pip stays the fallback.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "$(PYTHON) is older than Python 3.11: name another, for instance make setup PYTHON=python3.13" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 14))' || \
	echo "warning: tested with Python 3.11 to 3.13; $$($(PYTHON) --version) is newer" >&2
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt uv || echo "no uv: going on with pip, which is slower"
	@if [ -x $(BIN)/uv ] && $(BIN)/uv $(subst pip install,pip install --python $(BIN)/python,$(INSTALL)); then :; \
	else echo "installing with pip"; $(BIN)/python -m $(INSTALL); fi
	@$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt $(WITHOUT_DEPS)
	@touch $@

demo: setup  ## the whole toolkit on generated images in 10 to 20 minutes: output/demo/report.html
	$(BIN)/mae-dat demo

lint: setup  ## ruff, codespell, mypy, and the order of the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: lint  ## lint and every test that is not slow, JOBS=2 at a time
	$(PYTEST)

# Exit code 5 is pytest's "no test selected".
test-slow: setup  ## the tests marked slow
	$(PYTEST) -m slow || [ $$? -eq 5 ]

docs: setup  ## the documentation site: output/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: setup  ## speed and memory beside the reference code's, and the goals: docs/explanation/performance.md
	$(BIN)/python -m benchmarks

clean:  ## remove caches and build products; .venv and output stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
