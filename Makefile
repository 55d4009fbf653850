# Two commands on a fresh machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Tests wait more than they compute: three processes keep two cores busy.
SPREAD := -n 3 --dist worksteal

.PHONY: help setup demo serve test test-all check format definitions bench chaos soak clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install what uv.lock names

$(STAMP): pyproject.toml uv.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import uv' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@UV_PROJECT_ENVIRONMENT=$(VENV) $(BIN)/uv sync --frozen --quiet --extra dev
	@touch $(STAMP)

demo: $(STAMP) ## the service with a simulated ComfyUI, one picture, live progress (ONCE=1: end after it)
	@$(BIN)/management-api demo $(if $(ONCE),--once)

serve: $(STAMP) ## the service, with the settings of the environment and .env
	@$(BIN)/management-api serve

test: $(STAMP) ## the tests: minutes, nothing but Python needed
	@$(BIN)/python -m pytest -q $(SPREAD) -m "not slow"

test-all: $(STAMP) ## the slow ones too: real processes, faults, long runs
	@$(BIN)/python -m pytest -q $(SPREAD)

check: $(STAMP) ## format, lint, types, import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP) ## let ruff write the format
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

definitions: $(STAMP) ## write docs/events.d.ts and docs/asyncapi.yaml from the stream's types
	@$(BIN)/python -m management_api.definitions

bench: $(STAMP) ## the measurements of docs/performance.md
	@$(BIN)/python -m benchmarks

chaos: $(STAMP) ## kill -9 of the service and of ComfyUI: N=200 kills, SEED=1
	@$(BIN)/python -m tests.chaos --kills $(or $(N),200) --seed $(or $(SEED),1)

soak: $(STAMP) ## a light load for MINUTES=10: memory, file descriptors, threads stay flat
	@$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),10)

clean: ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
