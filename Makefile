# make demo      trains a fused SCVI, from a bare clone
# make test      ruff, mypy and the whole test suite
# make lint      ruff and mypy alone
# make sanitize  tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
# make bench     the benchmarks
#
# Each makes .venv first and installs into it what it needs; a second call finds it there.
# PYTHON=python3.12 chooses the interpreter, VENV=folder another (also an existing) environment.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
BUILD_INPUTS := setup.py pyproject.toml decoder_fast/_build.py $(wildcard csrc/*)

.PHONY: demo test lint sanitize bench
.DELETE_ON_ERROR:

demo: $(VENV)/scvi.stamp
	$(BIN)/decoder-fast train --demo --out demo-output

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

sanitize: $(VENV)/test.stamp
	PYTHON=$(BIN)/python tests/sanitize.sh

bench: $(VENV)/test.stamp $(VENV)/bench.stamp
	$(BIN)/python -m bench

# torch goes first and by itself: without a pin pip may choose a build that is gigabytes larger.
$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "decoder_fast needs Python 3.11 or later, and '$(PYTHON)' is:" \
	         "$$($(PYTHON) --version 2>&1 || true)." \
	         "Choose another with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	@$(BIN)/python -c 'from importlib.metadata import version; \
	    assert version("torch").startswith(("2.11.", "2.12.", "2.13."))' 2>/dev/null \
	    || { echo "installing $(TORCH)"; $(BIN)/python -m pip install "$(TORCH)"; }
	@touch $@

# One stamp for each extra: scvi, test, bench.
$(VENV)/%.stamp: $(VENV)/torch.stamp $(BUILD_INPUTS)
	$(BIN)/python -m pip install --editable '.[$*]'
	@touch $@
