# make demo      trains a fused SCVI, from a bare clone
# make test      ruff, mypy and the whole test suite
# make lint      ruff and mypy alone
# make sanitize  tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
# make bench     scvi-tools, compiled scvi-tools and this package on your machine: bench-output/
# make aot       the Triton kernels, compiled for many GPUs without one: bench/results/aot-*, costs.*
# make gpu       everything that wants a GPU: tests, times and memory, in ten minutes;
#                GPU_ARGS='--out folder' hands options over
#
# Each makes .venv first and installs into it what it needs; a second call finds it there.
# PYTHON=python3.12 chooses the interpreter, VENV=folder another (also an existing) environment.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
BUILD_INPUTS := setup.py pyproject.toml decoder_fast/_build.py $(wildcard csrc/*)

# The oldest Triton that is supported, beside the one that is installed; with a NumPy that it bears.
OLD_TRITON := $(abspath $(VENV))/triton-3.6
OLD_TRITON_TESTS := $(wildcard tests/test_*_triton.py) tests/test_aot.py

.PHONY: demo test test-old-triton lint sanitize bench aot gpu
.DELETE_ON_ERROR:

demo: $(VENV)/scvi.stamp
	$(BIN)/decoder-fast train --demo --out demo-output

test: lint
	$(BIN)/python -m pytest
ifeq ($(shell uname -s),Linux)  # elsewhere there is no Triton
	$(MAKE) test-old-triton
endif

test-old-triton: $(VENV)/test.stamp $(OLD_TRITON).stamp
	PYTHONPATH=$(OLD_TRITON) $(BIN)/python -m pytest $(OLD_TRITON_TESTS)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

sanitize: $(VENV)/test.stamp
	PYTHON=$(BIN)/python tests/sanitize.sh

bench: $(VENV)/scvi.stamp
	$(BIN)/decoder-fast bench

aot: $(VENV)/test.stamp $(OLD_TRITON).stamp
	@failed=0; for triton in '' $(OLD_TRITON); do \
	    PYTHONPATH=$$triton $(BIN)/python -m bench.aot || failed=1; \
	done; exit $$failed

# With PYTHON's own packages where they see a GPU: such machines often cannot install any.
gpu:
	@if $(PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; \
	then $(PYTHON) -m bench.gpu $(GPU_ARGS); \
	else $(MAKE) $(VENV)/test.stamp && $(BIN)/python -m bench.gpu $(GPU_ARGS); fi

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

$(OLD_TRITON).stamp: $(VENV)/torch.stamp
	rm -rf $(OLD_TRITON)
	$(BIN)/python -m pip install --no-deps --target $(OLD_TRITON) 'triton==3.6.0' 'numpy<2.4'
	@touch $@

# One stamp for each extra: scvi, test, bench.
$(VENV)/%.stamp: $(VENV)/torch.stamp $(BUILD_INPUTS)
	$(BIN)/python -m pip install --editable '.[$*]'
	@touch $@
