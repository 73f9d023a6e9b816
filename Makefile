# A target that needs .venv sets it up first: the packages that are missing, and fastrnn, built in place.
# Needed beforehand: Python 3.10 or newer and a C++ compiler.

VENV := .venv
PYTHON ?= $(or $(wildcard $(VENV)/bin/python),python3)
TORCH ?=
OUT ?= build/gpu

READY := $(VENV)/.ready
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
INSTALL := $(IN_VENV) python -m pip --disable-pip-version-check install --quiet
RUFF := $(IN_VENV) python -m ruff
CLANG_FORMAT := $(IN_VENV) python -c 'from clang_format import clang_format; clang_format()'
CPP = $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup demo test sanitize plant-bugs lint format bench gpu gpu-quick clean FORCE

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "make setup PYTHON=python3.12   if there is no .venv yet, create it with this Python (now: $(PYTHON))"
	@echo "make setup TORCH=2.12.0        install this torch, even if there is another"

setup: $(READY)  ## set up .venv

demo: $(READY)  ## train the character RNN of the lecture against torch.nn, then run the quick benchmark
	$(IN_VENV) python -m benchmarks.demo

test: $(READY)  ## run all tests
	$(IN_VENV) python -m pytest tests -q

sanitize:  ## run the C++ core under sanitizers of memory, undefined behaviour and threads (needs no .venv)
	$(PYTHON) tests/sanitize/run.py

plant-bugs: $(READY)  ## plant bugs in the CUDA kernels, one at a time, and see that the tests notice each
	$(IN_VENV) python tests/emulator/plant_bugs.py

lint: $(READY)  ## check style
	$(RUFF) check .
	$(RUFF) format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(CPP)

format: $(READY)  ## repair style as far as tools can
	$(RUFF) check --fix --exit-zero .
	$(RUFF) format .
	$(CLANG_FORMAT) -i $(CPP)

bench: $(READY)  ## measure fastrnn against its peers
	$(IN_VENV) python -m benchmarks

gpu:  ## with a GPU: build, test, check memory and races, measure; logs go to OUT=folder (needs no .venv)
	$(PYTHON) tests/gpu/run.py $(OUT)

gpu-quick:  ## the same in three minutes
	$(PYTHON) tests/gpu/run.py $(OUT) --quick

clean:  ## remove what was built; .venv keeps what was fetched
	rm -rf $(READY) build *.egg-info fastrnn/*.so .pytest_cache .ruff_cache .hypothesis __pycache__
	find csrc fastrnn benchmarks tests -name __pycache__ -exec rm -rf {} +

# pip fetches nothing that is already there. FORCE: a torch that was asked for must be looked at each time.
$(READY): pyproject.toml setup.py kernel_flags.py .ci/venv.py $(shell find csrc -type f) $(if $(TORCH),FORCE)
	@command -v $(PYTHON) > /dev/null || \
		{ echo "There is no $(PYTHON). fastrnn needs Python 3.10 or newer: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) .ci/venv.py $(VENV) $(TORCH)
	$(INSTALL) "setuptools>=77" pybind11 ninja
	$(INSTALL) --no-build-isolation --editable ".[dev]"
	@touch $@
