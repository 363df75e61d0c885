# sudo make bench | test | soak | test-redis-suite | setup;  make lint.  What is there already is skipped.
#   ARGS="..."   more arguments for kflex-repro bench redis, pytest, or tests.redis_suite
#   PYTHON=...   the interpreter for .venv (3.11 or newer)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
BIN := .venv/bin
C_SOURCES := $(wildcard bpf/*.c bpf/*.h module/*.c module/*.h patches/libbpf_trace/*.[ch] tests/artifact/*_driver.c)
export PYTHON

# setup and bench want root only where packages are missing, or to measure on this host rather than in a VM.
ifneq ($(filter test soak test-redis-suite,$(MAKECMDGOALS)),)
ifneq ($(shell id -u),0)
$(error make $(MAKECMDGOALS) needs root: sudo make $(MAKECMDGOALS))
endif
endif

.PHONY: help setup bench test soak test-redis-suite lint format clean

help:
	@echo "sudo make bench   set up, build, benchmark plain Redis against the offload"
	@echo "     make bench   the same in a VM, where BPF is refused or you are not root (packages must be there)"
	@echo "sudo make test    set up, lint, run the tests"
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

test: setup lint
	@$(BIN)/python -m pytest $(ARGS)

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
