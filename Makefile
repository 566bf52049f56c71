# Two commands matter: `make run` and `make test`. Both install what is missing first.
.DEFAULT_GOAL := help
.PHONY: help setup world run pipeline trap mgrd base test check format soak chaos clean

# Where torch's CPU build comes from when the places that pip is configured with do not hold it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
SEED ?= 0
SEEDS ?= 1
CELL ?=
LOCK ?= locks/cpu.txt
BIN := $(CURDIR)/.venv/bin
QUICKSTART := examples/quickstart
TRAP := examples/verifiable_reward_trap
MGRD := examples/mgrd

# Spinning threads of one process slow every other one down when there are fewer cores than processes.
export OMP_NUM_THREADS := 1
export OMP_WAIT_POLICY := PASSIVE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup: ## install the locked packages and rlaudio into .venv
	@PYTHON="$(PYTHON)" sh scripts/setup.sh --lock "$(LOCK)" --torch-index "$(TORCH_INDEX)"

world: setup ## make the spoken world (sounds and prompt records)
	@cd $(QUICKSTART) && $(BIN)/python -m spoken_world.make --out data --train 600 --heldout 450 --heldout-voices 300 --processes 2

run: world ## the main job: train the tiny policy by RL; SEED=n
	@$(BIN)/rlaudio train $(QUICKSTART)/config.yaml run.seed=$(SEED)

pipeline: world ## every stage in order: mid-training to evaluation; started again it goes on; SEED=n
	@cd $(QUICKSTART) && $(BIN)/python -m spoken_world.stages --processes 2
	@$(BIN)/rlaudio train $(QUICKSTART)/pipeline.yaml run.seed=$(SEED)

trap: world ## verified reward, judge, both, in stages, with and without pressure: arms compared; goes on; SEEDS=n
	@cd $(TRAP) && PYTHONPATH=$(CURDIR)/$(QUICKSTART) $(BIN)/python -m trap_arms --seeds $(SEEDS)

mgrd: world ## sample, filter, fine-tune, reinforce, twice over: reasoning that hears, in a table; goes on; SEEDS=n
	@cd $(MGRD) && PYTHONPATH=$(CURDIR)/$(QUICKSTART) $(BIN)/python -m mgrd_study --seeds $(SEEDS)

base: world ## rebuild the start and judge checkpoints from nothing (about an hour)
	@cd $(QUICKSTART) && $(BIN)/python -m spoken_world.base

test: setup ## every test: unit first, then real Ray, vLLM and DeepSpeed
	@$(BIN)/python -m pytest $(wildcard tests/unit tests/ray_local tests/gpu)

check: setup ## ruff (lint, format) and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup ## rewrite the sources as `make check` wants them
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

soak: setup ## long runs with faults, or to learn; CELL=name picks one
	@$(BIN)/python -m pytest tests -m soak -k "$(CELL)" --timeout=0

chaos: setup ## kill every role in every phase, once each with real engines, then 105 faults; goes on when started again; CELL=name
	@$(BIN)/python -m tests.chaos --cell "$(CELL)"

clean: ## remove caches and build leftovers; runs, data and .venv stay
	@rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
