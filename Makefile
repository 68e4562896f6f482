# make demo, make test ... set up what they need: a virtual environment in .venv unless one is active (conda's too),
# then var_fast in it. A second run finds it done. TORCH=torch==2.13.0 may name another version or a wheel.
TORCH ?= torch==2.13.0
PYTHON ?= python3
JOBS ?= 2
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
VENV := $(or $(ACTIVE),$(CURDIR)/.venv)
BIN := $(VENV)/bin
# one stamp per environment, so that two environments can share a checkout
STAMP := .stamp$(subst /,-,$(VENV))
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
DEMO_LABELS := face-smiling,cat-face,heart,country-flag,time,person,keycap,food-fruit
DEMO_OPTIONS := --model demo --labels $(DEMO_LABELS) --seeds 0-15 --cfg 3 --top-k 100 --top-p 0.7

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench bench-report compile-report gpu-check clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP)-run  ## sample 16 images from the model in this package into demo.png
	@$(BIN)/var-fast sample $(DEMO_OPTIONS) --out demo.png
	@echo "the picture is $(CURDIR)/demo.png"

# threads that wait must not spin: the other processes need the cores
test: $(STAMP)-test  ## every test that needs no GPU, in JOBS=2 processes
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

lint: $(STAMP)-test  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)-bench  ## each operator on small shapes, by pytest-benchmark (BENCH=--benchmark-autosave to keep)
	$(BIN)/python -m pytest -q bench/ops/bench_operators.py $(BENCH)

bench-report: $(STAMP)-bench  ## the throughput report of this machine (BENCH="--suite sample ..." for options)
	$(BIN)/python bench/run.py $(BENCH)

compile-report: $(STAMP)-test  ## registers, spills, shared memory, tensor-core use of all kernels, without a GPU
	$(BIN)/python bench/compile_report.py

gpu-check:  ## build with the python3 at hand (no network needed), run the tests marked gpu, write gpu_check.json
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m var_fast.gpu_check

clean:  ## remove what was built here; a virtual environment stays
	rm -rf build dist *.egg-info .stamp-* var_fast/*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# made only where none is active; conda's have no pyvenv.cfg, so that one is no prerequisite there
MADE := $(if $(ACTIVE),,$(VENV)/pyvenv.cfg)
$(CURDIR)/.venv/pyvenv.cfg:
	$(PYTHON) -m venv $(@D) || { rm -rf $(@D); false; }

$(STAMP)-run: $(MADE) $(SOURCES)
	$(call install,.)
	@touch $@

$(STAMP)-test: $(MADE) $(SOURCES)
	$(call install,'.[test]')
	@touch $@ $(STAMP)-run

$(STAMP)-bench: $(MADE) $(SOURCES)
	$(call install,'.[bench]')
	@touch $@ $(STAMP)-run

define install
	@$(BIN)/python -c 'import torch' 2>/dev/null || (set -x; $(BIN)/python -m pip install -q $(TORCH))
	$(BIN)/python -m pip install -q -e $(1)
endef
