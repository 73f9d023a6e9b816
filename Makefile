# A target that needs .venv sets it up first: the packages that are missing, and fastrnn, built in place.
# Needed beforehand: Python 3.10 or newer and a C++ compiler; for cuda-build nvcc and Python 3.12.

VENV := .venv
PYTHON ?= $(or $(wildcard $(VENV)/bin/python),python3)
TORCH ?=
OUT ?= build/gpu
WHEEL_PYTHONS ?=

CUDA_VENV := .cuda-venv
CUDA_PYTHON ?= $(shell for python in python3.12 $(HOME)/.pyenv/versions/3.12*/bin/python; do \
	$$python -c '' 2> /dev/null && echo $$python && break; done)

CLIENTS_VENV := .clients-venv
CLIENTS_INSTALL := $(CLIENTS_VENV)/bin/python -m pip --disable-pip-version-check install --quiet

READY := $(VENV)/.ready
MADE_OF := $(addprefix fastrnn/,kernel_flags.py nvcc.py cells.py equation.py derivatives.py codegen.py)
CUDA_READY := $(CUDA_VENV)/.ready
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
INSTALL := $(IN_VENV) python -m pip --disable-pip-version-check install --quiet
RUFF := $(IN_VENV) python -m ruff
CLANG_FORMAT := $(IN_VENV) python -c 'from clang_format import clang_format; clang_format()'
CPP = $$(find csrc examples tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | grep -v generated.h)

.PHONY: help setup cuda-setup demo examples docs test clients cuda-build wheel sanitize plant-bugs lint types format bench gpu gpu-quick clean FORCE

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "make setup PYTHON=python3.12   if there is no .venv yet, create it with this Python (now: $(PYTHON))"
	@echo "make setup TORCH=2.12.0        install this torch, even if there is another"
	@echo "make wheel TORCH=2.12.0        wheels that serve this torch; WHEEL_PYTHONS=python3.12 for this Python alone"

setup: $(READY)  ## set up .venv

cuda-setup: $(CUDA_READY)  ## set up the environment of cuda-build

demo: $(READY)  ## train the character RNN of the lecture against torch.nn, then run the quick benchmark
	$(IN_VENV) python -m benchmarks.demo

examples: $(READY)  ## run every system of the lectures and draw docs/gallery: five minutes (`python -m examples --list` names them)
	$(IN_VENV) python -m examples --all --out docs/gallery

docs: $(READY)  ## build the documentation in build/site; a warning is an error, and no network is needed
	$(IN_VENV) NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet
	@echo "build/site/index.html; searching needs a server: python3 -m http.server --directory build/site"

test: $(READY)  ## run all tests, in two processes
	$(IN_VENV) OMP_WAIT_POLICY=passive python -m pytest tests -q -n 2 --dist loadfile --no-loadscope-reorder

cuda-build: $(CUDA_READY)  ## build with CUDA kernels in an environment of its own, and test what needs no GPU
	FASTRNN_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0 9.0a 10.0+PTX" $(CUDA_VENV)/bin/python setup.py -q build \
		--build-lib build/cuda/lib --build-temp build/cuda/temp
	$(CUDA_VENV)/bin/python -m pytest -q -o pythonpath=build/cuda/lib tests/cuda_build

clients: $(READY)  ## run other people's programs, converted, and the documentation's pages on them: they are fetched into an environment of their own
	$(IN_VENV) python .ci/venv.py $(CLIENTS_VENV)
	$(CLIENTS_INSTALL) -r tests/clients/requirements.txt
	$(CLIENTS_INSTALL) --no-deps -r tests/clients/no-deps.txt
	$(CLIENTS_VENV)/bin/python -m pytest -q -rs tests/clients tests/docs/test_docs_blocks.py

wheel:  ## for each Python from 3.10 to 3.14 that is here: a manylinux wheel in dist, used in an environment without a compiler
	$(PYTHON) .ci/wheels.py dist "$(TORCH)" $(WHEEL_PYTHONS)

sanitize:  ## run the C++ core under sanitizers of memory, undefined behaviour and threads (needs no .venv)
	$(PYTHON) tests/sanitize/run.py

plant-bugs: $(READY)  ## plant bugs in the CUDA kernels, one at a time, and see that the tests notice each
	$(IN_VENV) python tests/emulator/plant_bugs.py

lint: $(READY) types  ## check style and types
	$(RUFF) check .
	$(RUFF) format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(CPP)

types: $(READY)  ## check types, in mypy's strict mode
	$(IN_VENV) python -m mypy

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
	rm -rf $(READY) build dist examples/out *.egg-info fastrnn/*.so fastrnn/built_with.json .pytest_cache .ruff_cache .mypy_cache .hypothesis __pycache__
	find csrc fastrnn benchmarks examples tests -name __pycache__ -exec rm -rf {} +

# pip fetches nothing that is already there. FORCE: a torch that was asked for must be looked at each time.
$(READY): pyproject.toml setup.py $(MADE_OF) .ci/venv.py $(shell find csrc -type f) $(if $(TORCH),FORCE)
	@command -v $(PYTHON) > /dev/null || \
		{ echo "There is no $(PYTHON). fastrnn needs Python 3.10 or newer: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) .ci/venv.py $(VENV) $(TORCH)
	$(INSTALL) "setuptools>=77" pybind11 ninja
	$(INSTALL) --no-build-isolation --editable ".[dev]"
	@touch $@

$(CUDA_READY): Makefile
	@test -n "$(CUDA_PYTHON)" || \
		{ echo "There is no Python 3.12. Name one: make cuda-build CUDA_PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(CUDA_PYTHON) -c 'import sys; sys.path.append("fastrnn"); import nvcc; nvcc.CUDA_HOME or sys.exit("There is no nvcc, neither on the PATH nor in CUDA_HOME.")'
	$(CUDA_PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip --disable-pip-version-check install --quiet torch==2.11.0 \
		"setuptools>=77" pybind11 ninja numpy pytest
	@touch $@
