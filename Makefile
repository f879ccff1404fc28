# `make` alone lists the targets.
.DEFAULT_GOAL := help
.PHONY: help setup demo check test trl agents docs docs-serve bench bench-gpu bench-trainer reliability up down ps clean lock
PROJECT ?= examples/digits
# The compose project of PROJECT: each folder has its own containers, volumes and images, so several run side by side.
FOLDER_PATH := $(shell realpath --no-symlinks --canonicalize-missing -- '$(PROJECT)')
FOLDER := $(shell basename -- '$(FOLDER_PATH)' | tr '[:upper:]' '[:lower:]' | tr -c '[:alnum:]\n_-' '-')
NAME := $(or $(NAME),$(COMPOSE_PROJECT_NAME),tandem-$(FOLDER))
TESTS ?= tests
BIN := .venv/bin
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## Build .venv with pip from the pinned locks, if it is not up to date (PYTHON=python3.11)
	@PYTHON=$(PYTHON) scripts/setup

demo: setup  ## Train PROJECT on this machine's CPU and watch it learn (PROJECT=examples/digits)
	@$(BIN)/tandem demo '$(PROJECT)'

check: setup  ## Lint, format, types, Dockerfiles, documentation, and no package source named in a tracked file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/*.Dockerfile
	$(MKDOCS) build --strict --quiet
	scripts/check_hosts
	scripts/check_words

test: setup  ## Run the tests; prints which were skipped and why (TESTS=tests/unit)
	$(BIN)/pytest $(TESTS)

trl: setup  ## Build .venv-trl, the environments in which `make test` runs scripts of several versions of TRL
	scripts/trl_environments

agents: setup  ## Install the libraries of agents and environments that `make test` runs into .venv-agents
	scripts/agent_libraries

docs: setup  ## Write the reference pages and build the documentation into site/
	@for script in docs/reference/make_*.py helm/make_files.py; do $(BIN)/python $$script || exit; done
	$(MKDOCS) build --strict

docs-serve: setup  ## Show the documentation on http://127.0.0.1:8001 while you write it
	$(MKDOCS) serve

bench: setup  ## Measure performance and write docs/benchmarks.md (BENCH=publishing for one; ARGS=--quick to try it)
	$(BIN)/python tests/bench/suite.py $(if $(BENCH),--only $(BENCH)) $(ARGS)

bench-gpu: setup  ## Measure updates and publishing on a GPU, with models of random weights (ARGS="--shapes 0.5B")
	$(BIN)/python tests/bench/gpu.py $(ARGS)

bench-trainer: setup  ## Compare time and memory of one update with TRL (creates .venv-trl; 45 minutes on 2 cores)
	$(BIN)/python tests/bench/trainer.py
	$(BIN)/python tests/bench/trainer.py --profile --shapes 32+512 --sides tandem trl

reliability: setup  ## Cause faults in a run under Compose and write docs/reliability.md (ARGS="--hours 3 --fault-every-s 120")
	$(BIN)/python tests/chaos/reliability.py $(ARGS)

# By default, generator and trainer get half of the cores each. With `max_lag: 0` and for a script, they take turns, and
# both get all.
CHOSEN := $(TANDEM_GENERATOR_CPUS)$(TANDEM_TRAINER_CPUS)
TAKE_TURNS := $(if $(CHOSEN),,$(or $(SCRIPT),$(shell sed -n 's/^[^\#]*\bmax_lag: *0\b.*/yes/p' '$(FOLDER_PATH)/config.yaml' 2>/dev/null)))
up: export TANDEM_GENERATOR_CPUS ?= $(if $(TAKE_TURNS),0-$(shell echo $$(($$(nproc) - 1))),$(shell echo 0-$$(($$(nproc) / 2 - 1))))
up: export TANDEM_TRAINER_CPUS ?= $(shell echo $(if $(TAKE_TURNS),0,$$(($$(nproc) / 2)))-$$(($$(nproc) - 1)))
# Neither service may use more than 80 % of the memory, so that a leak ends a process and not the host.
up: export TANDEM_GENERATOR_MEMORY ?= $(shell awk '/MemTotal/ {print int($$2 * 0.8) "k"}' /proc/meminfo)
up: export TANDEM_TRAINER_MEMORY ?= $(TANDEM_GENERATOR_MEMORY)
up: export TANDEM_REVISION ?= $(shell git rev-parse --short HEAD 2>/dev/null)
up down: export COMPOSE_PROJECT_NAME = $(NAME)
up: export TANDEM_PROJECT = $(FOLDER_PATH)
up: export TANDEM_SCRIPT ?= $(SCRIPT)
up: export TANDEM_WATCH ?= $(WATCH)
up: export TANDEM_METRICS ?= $(METRICS)
up:  ## Train PROJECT, or its TRL script SCRIPT, in containers named NAME (WATCH=1: with tandem watch, METRICS=1: with Grafana)
	@scripts/say_build
	scripts/up --build; status=$$?; \
		echo "Copy the results into ./runs: docker compose --project-name $(NAME) cp trainer:/runs ."; exit $$status

down:  ## Remove the containers of PROJECT but keep their volumes (docker compose --profile '*' down --volumes: both)
	docker compose --profile '*' down

ps:  ## List what runs in containers, by NAME
	docker compose ls --all --filter name=tandem

lock:  ## Pin and hash the requirements (UPGRADE=1: newer versions; PIP_FIND_LINKS=folder with torch's CPU wheel)
	@PATH="$(CURDIR)/$(BIN):$$PATH" scripts/lock

clean:  ## Remove .venv, caches and runs
	rm -rf .venv .venv-trl .venv-agents .pytest_cache .mypy_cache .ruff_cache .hypothesis site runs examples/*/runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
