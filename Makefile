# demo   see it all work          test   set up and run the tests      check  the long forms too
# bench  time everything here     gpu    all of it on a GPU            mutants  break every kernel
# format, docs
#
# PYTHON=python3.12        which Python to make .venv from
# TORCH=installed          use the torch and triton of that Python instead of the pinned ones
# BUDGET=540 OUT=folder    of `make gpu`: seconds for it all, and where the results go
# KERNELS="FILE ..."       of `make mutants`: break these only, e.g. kernels/triton/softmax.py

PYTHON ?= python3
TORCH ?= pinned
BUDGET ?= 540
BIN := .venv/bin
READY := .venv/ready-$(TORCH)
ENVIRONMENT := OMP_WAIT_POLICY=passive $(if $(wildcard /dev/nvidia0),,TRITON_INTERPRET=1 TILEWISE_EMULATE=1)
PYTEST := $(ENVIRONMENT) $(BIN)/python -m pytest -n 2 -q -rfE --timeout 600 --durations 12

.PHONY: demo test check lint bench gpu mutants format docs native
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/tilewise demo

test: $(READY)-test native
	$(PYTEST) -m "not slow"

check: $(READY)-test lint
	if command -v nvcc >/dev/null; then $(BIN)/tilewise build --only-cuda; fi
	$(PYTEST)
	$(MAKE) mutants

mutants: $(READY)-test
	$(BIN)/python tests/mutants.py $(KERNELS)

lint: $(READY)-test
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

bench: $(READY)
	$(BIN)/tilewise bench --save

gpu:
	$(PYTHON) benchmarks/gpu.py --budget $(BUDGET) $(if $(OUT),--output "$(OUT)")

format: $(READY)-test
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .
	if command -v clang-format >/dev/null; then clang-format -i $$(git ls-files 'csrc/*'); fi

docs: $(READY)
	$(BIN)/python docs/pages.py

# The CUDA kernels for the CPU and for one architecture, where there are compilers; from the cache
# if unchanged.
native: $(READY)-test
	if command -v c++ >/dev/null; then TILEWISE_EMULATE=1 $(BIN)/tilewise build --only-cuda; fi
	if command -v nvcc >/dev/null; then TILEWISE_CUDA_ARCHS=90a-real $(BIN)/tilewise build --only-cuda; fi

# --- Setting up. The stamps are named by what was installed, and older than the files they hold for.

SITE := $(if $(filter installed,$(TORCH)),--system-site-packages)
PINS := .venv/constraints-$(TORCH).txt
# Theirs to say: against a pin that it refuses, pip would replace the torch that is installed.
THEIRS := torch|triton|numpy|setuptools

$(PINS): constraints.txt
	$(PYTHON) -m venv $(SITE) .venv
	sed $(if $(SITE),-E '/^($(THEIRS))[=<>]/d',-n p) constraints.txt > $@

$(READY): $(PINS) pyproject.toml setup.py
	$(BIN)/python -m pip install -c $(PINS) -e .
	touch $@

$(READY)-test: $(PINS) pyproject.toml setup.py
	TILEWISE_CUDA=OFF $(BIN)/python -m pip install -c $(PINS) -e '.[test]'
	touch $@
