# Every target sets up what it needs in .venv first, from nothing but Python 3.11 and pip.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

# The Python that makes .venv; afterwards only .venv is used.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
NPROC ?= 4
ARGS ?=
# Processes that share out the test files. Most tests keep one core busy, or wait: three keep two
# cores busy (10 minutes, where two take 20).
TEST_JOBS ?= 3

# One thread a rank: several ranks share the cores, and OpenMP threads that wait for a core spin.
export OMP_NUM_THREADS ?= 1

VENV := .venv
RUN := $(VENV)/bin/python
# A new install is due when the requirements change, or when the checkout has moved.
WANTED := $(shell { pwd; cat pyproject.toml constraints.txt; } | cksum | cut -d' ' -f1)
INSTALLED := $(VENV)/.installed-$(WANTED)
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: help setup demo test test-slow test-all test-gpu parity check format clean

help:
	@echo 'make demo      train a small multilingual model on $(NPROC) CPU ranks and report'
	@echo '               (make demo NPROC=1 ARGS="train.train_steps=20" for less)'
	@echo 'make test      the tests, but for the slow ones and those that need a GPU'
	@echo 'make test-slow the slow ones, twenty minutes more; make test-all: both'
	@echo 'make test-gpu  the ones that need a GPU'
	@echo 'make parity    every layout up to 8 ranks against one process; an hour, goes on where'
	@echo '               it was stopped, and writes docs/parity.md'
	@echo 'make check     ruff and mypy'
	@echo 'make format    let ruff put the code into form'
	@echo 'make setup     only make .venv'
	@echo 'make clean     remove .venv and caches; runs/ stays'

setup: $(INSTALLED)
	@:

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'Magnetron needs Python 3.11 or newer, and $(PYTHON) is not that.' \
	    'Name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo '$(PYTHON) cannot make virtual environments: its venv or ensurepip module is missing.' \
	    'On Debian and Ubuntu: apt-get install python3-venv (or python3.11-venv).' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone, so that nothing else decides which build of it comes.
# torchscale (the tests compare with it) would bring timm and a torchvision that fits no CPU torch:
# it comes without its dependencies, and fairscale is the only one of them that its decoder needs.
$(INSTALLED): | $(VENV)/bin/python
	@echo 'Setting up $(VENV): some minutes, once.'
	@$(PIP) torch
	@$(PIP) -e '.[dev]'
	@$(PIP) --no-deps torchscale fairscale
	@rm -f $(VENV)/.installed-*
	@touch $@

# The demo's own layout takes 4 ranks (or 8, ...); fewer take another one.
LAYOUT_FOR_1 := parallel=single
LAYOUT_FOR_2 := parallel=tp2
DEMO_LAYOUT = $(if $(findstring parallel=,$(ARGS)),,$(LAYOUT_FOR_$(NPROC)))

demo: $(INSTALLED)
	$(RUN) -m torch.distributed.run --standalone --nproc_per_node $(NPROC) \
	  launch/pretrain.py +experiment=demo $(DEMO_LAYOUT) \
	  run_dir=runs/demo/$(shell date +%Y%m%d-%H%M%S) $(ARGS)

test: $(INSTALLED)
	$(RUN) -m pytest -n $(TEST_JOBS) --dist loadfile $(ARGS)

test-slow: $(INSTALLED)
	$(RUN) -m pytest -n $(TEST_JOBS) --dist loadfile -m 'slow and not gpu' $(ARGS)

test-all: $(INSTALLED)
	$(RUN) -m pytest -n $(TEST_JOBS) --dist loadfile -m 'not gpu' $(ARGS)

test-gpu: $(INSTALLED)
	$(RUN) -m pytest -m gpu $(ARGS)

parity: $(INSTALLED)
	$(RUN) -m tests.parity_matrix $(ARGS)

check: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) build dist ./*.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
