# Everything a person types. `make help` lists it.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
COMPILED := .venv-compiled
BIN := $(VENV)/bin
CONFIG ?= config.yaml
# What the compiled build is tested with. Broken builds are made of the checkout, so they would show nothing here.
COMPILED_TESTS := tests/e2e/test_compiled.py $(patsubst %,tests/e2e/test_%.py,openai_chat openai_errors openai_more anthropic \
	incomplete cancel passthrough money limits edges bad_input idempotency routing sessions queue) tests/chaos/test_worker_kills.py

.DEFAULT_GOAL := help
.PHONY: help run run-vllm engine-cpu wheel compiled test test-chaos test-compiled test-engine check lint format bench bench-quick bench-routing lock clean

help: ## This list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(VENV)/.base ## Install what is locked and serve on 127.0.0.1:8080 with config.yaml
	@$(BIN)/headgate serve --config $(CONFIG)

run-vllm: $(VENV)/.base ## Serve MODEL (a repository or a folder) with the vLLM that is installed, through a pool
	@test -n "$(MODEL)" || { echo "which one? make run-vllm MODEL=Qwen/Qwen3-0.6B" >&2; exit 1; }
	@$(BIN)/headgate engine run $(MODEL)

engine-cpu: ## Install vLLM for the CPU into .venv-engine (2.5 GB, once; Linux on x86-64)
	@tests/engine/setup

wheel: $(VENV)/.base ## Build the compiled wheel into dist (needs a C compiler; a minute or two)
	@echo "Compiling the request path ..."
	@rm -rf build dist
	@HEADGATE_COMPILE=1 PIP_CONSTRAINT=$(CURDIR)/requirements-dev.lock $(BIN)/pip wheel -q --disable-pip-version-check --no-deps -w dist .

compiled: $(COMPILED)/.installed ## Install the compiled wheel into .venv-compiled; .venv-compiled/bin/headgate is the command

test: $(VENV)/.dev ## Install what the tests need and run them (under five minutes)
	@tests/setup
	@tests/run -n 6 --dist worksteal --ignore tests/chaos --ignore tests/engine

test-chaos: $(VENV)/.dev ## Kill, freeze and flood everything, in small: seeded, two to four minutes
	@tests/setup
	@tests/run -n 6 --dist worksteal tests/chaos

test-compiled: compiled $(VENV)/.dev ## Run what goes through the gateway against the compiled build (under five minutes)
	@tests/setup
	@HEADGATE_TEST_PYTHON=$(CURDIR)/$(COMPILED)/bin/python tests/run -n 6 --dist worksteal -k "not broken" $(COMPILED_TESTS)

test-engine: $(VENV)/.dev ## Install CPU vLLM (2.5 GB, once) and run what needs a real engine
	@tests/engine/setup
	@tests/run -m engine tests/engine

lint: $(VENV)/.dev ## Format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# Most tests wait rather than compute, so there are more at a time than cores.
check: lint ## Format, lint, types, architecture and unit tests (under a minute)
	@$(BIN)/pytest -n 4 --dist worksteal -m "not engine and not e2e and not chaos" --ignore tests/e2e --ignore tests/chaos --ignore tests/engine

format: $(VENV)/.dev ## Format and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(VENV)/.dev ## Measure against nginx on the same core, write bench/RESULTS.md (about ten minutes)
	@$(BIN)/python -m bench

bench-quick: $(VENV)/.dev ## The same in about two minutes, nothing written
	@$(BIN)/python -m bench --quick

bench-routing: $(VENV)/.dev ## Judge the placement policies in simulation, write bench/routing/RESULTS.md (four minutes of one core)
	@$(BIN)/python -m bench.routing

lock: ## Pin every version again (the base install with hashes)
	@$(PYTHON) -m venv $(VENV)/.lock && $(VENV)/.lock/bin/pip install -q pip-tools
	@$(PYTHON) tests/support/requirements_in.py > requirements.in
	@$(VENV)/.lock/bin/pip-compile -q -U --generate-hashes --no-emit-index-url --no-emit-find-links --no-header \
		--strip-extras --allow-unsafe -o requirements.lock requirements.in
	@$(VENV)/.lock/bin/pip-compile -q -U --no-emit-index-url --no-emit-find-links --no-header \
		--strip-extras --allow-unsafe -c requirements.lock -o requirements-dev.lock requirements-dev.in

clean: ## Remove the virtual environments and build results (not the data in .headgate)
	@rm -rf $(VENV) $(COMPILED) .venv-engine build dist bench/build *.egg-info .mypy_cache .ruff_cache

$(VENV)/.base: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Headgate needs Python 3.11 or newer; this is " + sys.version.split()[0] + " (set PYTHON=...)" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing the locked dependencies into $(VENV) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

$(COMPILED)/.installed: $(shell find gateway policies backends local_engine -name '*.py') setup.py pyproject.toml requirements.lock
	@$(MAKE) --no-print-directory wheel
	@$(PYTHON) -m venv $(COMPILED)
	@$(COMPILED)/bin/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	@$(COMPILED)/bin/python -m pip install -q --disable-pip-version-check --no-deps --force-reinstall dist/headgate-*.whl
	@touch $@

$(VENV)/.dev: $(VENV)/.base requirements-dev.lock
	@echo "Installing what the tests need ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements-dev.lock
	@touch $@
