# `make` alone lists the targets.
.DEFAULT_GOAL := help
.PHONY: help setup demo check test docs docs-serve bench bench-trainer up down clean lock
PROJECT ?= examples/digits
TESTS ?= tests
BIN := .venv/bin
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## Build .venv with pip from the pinned locks (idempotent; PYTHON=python3.11)
	@PYTHON=$(PYTHON) scripts/setup

demo: setup  ## Watch a policy learn on this machine's CPU (PROJECT=examples/digits)
	@$(BIN)/tandem demo $(PROJECT)

check: setup  ## Lint, format, types, Dockerfiles, documentation, and no package source named in a tracked file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/*.Dockerfile
	$(MKDOCS) build --strict --quiet
	scripts/check_hosts

test: setup  ## Run the tests (TESTS=tests/unit); says what it skipped and why
	$(BIN)/pytest $(TESTS)

docs: setup  ## Write the reference pages and build the documentation into site/
	@for script in docs/reference/make_*.py helm/make_files.py; do $(BIN)/python $$script || exit; done
	$(MKDOCS) build --strict

docs-serve: setup  ## Show the documentation on http://127.0.0.1:8001 while you write it
	$(MKDOCS) serve

bench: setup  ## Measure and print ratios; gates nothing
	@for script in $(filter-out %/trainer.py %/trainer_update.py, $(wildcard tests/bench/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit; done

bench-trainer: setup  ## One update ÷ TRL's: time and peak memory (makes .venv-trl; 20 minutes on 2 cores)
	$(BIN)/python tests/bench/trainer.py
	$(BIN)/python tests/bench/trainer.py --profile

# Half of the cores each by default.
up: export TANDEM_GENERATOR_CPUS ?= $(shell echo 0-$$(($$(nproc) / 2 - 1)))
up: export TANDEM_TRAINER_CPUS ?= $(shell echo $$(($$(nproc) / 2))-$$(($$(nproc) - 1)))
up: export TANDEM_REVISION ?= $(shell git rev-parse --short HEAD 2>/dev/null)
up:  ## Train PROJECT in containers, to the end (docs/deploy/containers.md)
	TANDEM_PROJECT=$(abspath $(PROJECT)) docker compose up --build --detach || { docker compose logs preflight; exit 1; }
	docker compose logs --follow trainer
	docker compose stop
	exit $$(docker compose ps --all --format '{{.ExitCode}}' trainer)

down:  ## Remove the containers; their volumes stay (docker compose down --volumes)
	docker compose down

lock:  ## Pin and hash the requirements again (PIP_FIND_LINKS=folder with torch's CPU wheel)
	@PATH="$(CURDIR)/$(BIN):$$PATH" scripts/lock

clean:  ## Remove .venv, caches and runs
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis site runs examples/*/runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
