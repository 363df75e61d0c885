# sudo make bench | test | test-vm | soak | test-redis-suite | setup;  make lint.  What is there already is skipped.
#   ARGS="..."   more arguments for kflex-repro bench redis, pytest, or tests.redis_suite
#   KERNELS="..." for test-vm: series as 6.1, images, packages, directories; default: all at hand
#   PYTHON=...   the interpreter for .venv (3.11 or newer)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
BIN := .venv/bin
C_SOURCES := $(wildcard bpf/*.c bpf/*.h module/*.c module/*.h patches/libbpf_trace/*.[ch] tests/artifact/*_driver.c)
export PYTHON
# Not in the tree: it may be another user's, or root may have run the last `make lint` there.
LINT_CACHE := $(or $(KFLEX_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kflex-repro)/lint
export RUFF_CACHE_DIR := $(LINT_CACHE)/ruff
export MYPY_CACHE_DIR := $(LINT_CACHE)/mypy

# The others want root only where packages are missing, or to run on this host rather than in a VM.
ifneq ($(filter soak test-redis-suite,$(MAKECMDGOALS)),)
ifneq ($(shell id -u),0)
$(error make $(MAKECMDGOALS) needs root: sudo make $(MAKECMDGOALS))
endif
endif

.PHONY: help setup bench test test-vm soak test-redis-suite lint format clean

help:
	@echo "sudo make bench   set up, build, benchmark plain Redis against the offload"
	@echo "     make bench   the same in a VM, where BPF is refused or you are not root (packages must be there)"
	@echo "sudo make test    set up, lint, run the tests"
	@echo "     make test    those that need no root, and in a VM the smoke tests"
	@echo "make test-vm      the smoke tests in a VM on every kernel at hand, and what each kernel can do"
	@echo "sudo make soak    set up, run the long tests"
	@echo "sudo make test-redis-suite   Redis's own tests, plain and offloaded (an hour; ARGS=--quick: a minute)"
	@echo "sudo make setup   system packages, .venv, BPF objects, the Redis module"
	@echo "make lint         ruff, mypy, clang-format"

# The tests build a small tree in the artifact's shape.
test soak: SETUP := --tests

setup:
	@scripts/setup $(SETUP)
	@$(BIN)/kflex-repro build

# Not the whole of setup: objects for a kernel without BTF cannot be built, and a VM does not need them.
bench:
	@scripts/setup
	@$(BIN)/kflex-repro bench redis $(ARGS)

# Not the whole of setup: a kernel without BTF has no objects to build, and the VM builds its own.
test:
	@scripts/setup $(SETUP)
	@$(MAKE) --no-print-directory lint
	@$(BIN)/python -m pytest $(ARGS)

test-vm:
	@scripts/setup
	@$(BIN)/python -m tests.vm $(KERNELS) $(ARGS)

soak: setup
	@KFLEX_SOAK=1 $(BIN)/python -m pytest -m soak $(ARGS)

test-redis-suite:
	@scripts/setup --redis-suite
	@$(BIN)/kflex-repro build
	@$(BIN)/python -m tests.redis_suite $(ARGS)

lint:
	@if [ ! -x $(BIN)/ruff ]; then echo "no .venv yet: sudo make setup" >&2; exit 1; fi
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(C_SOURCES),clang-format --dry-run -Werror $(C_SOURCES))

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(C_SOURCES),clang-format -i $(C_SOURCES))

clean:
	rm -rf .venv .make *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
