# The developer loop. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WITH_EXTRAS := $(VENV)/.installed-extras
# Which checkpoint make repro evaluates: best, latest, or a name.
CHECKPOINT := best
EXTRAS := hf,gguf,llama-cpp,onnx,lm-eval,tensorboard,wandb,mlflow,trackio,schedule-free,gan,joblib,submitit,ray,optuna
# Tests of faults outside tests/faults: rows of the fault table, resuming, and the ban of what runs code from a file.
FAULTS_ELSEWHERE := $(addprefix tests/, test_architecture.py cli/test_cli_values.py integration/test_distributed.py \
  integration/test_policies.py integration/test_resume.py integration/test_runs_command.py property/test_eval_laws.py \
  property/test_tokenizer_laws.py $(addprefix unit/test_, batches.py checkpoint.py corpus.py device.py \
  evaluation_scoring.py generate.py loading.py migrations.py prepared.py runs.py sampling.py saving.py session.py \
  tokenizers.py train.py))
# One thread a process: the tests run in two processes, and tiny tensors gain nothing from more.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types unit smoke test-all faults fuzz repro format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lmkit needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(WITH_EXTRAS): $(STAMP) constraints-extras.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --constraint constraints-extras.txt --editable '.[dev,$(EXTRAS)]' accelerate
	@touch $@

install: $(STAMP)  ## make .venv and install lmkit with the tested versions

demo: $(STAMP)  ## prepare, pretrain, eval-ppl and generate on the embedded corpus (at most 3 minutes on 2 cores)
	@$(BIN)/python scripts/demo.py

# Types and the five commands keep one core busy each.
test: lint  ## lint, types, the five commands in a row and the fast tests
	@$(MAKE) --no-print-directory -j 2 types smoke
	@$(MAKE) --no-print-directory unit

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy
	$(BIN)/mypy

unit: $(STAMP)  ## the fast tests
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m "not slow"

smoke: $(STAMP)  ## the five commands through the installed lmkit
	$(TEST_ENV) $(BIN)/python scripts/smoke.py

test-all: lint types $(WITH_EXTRAS)  ## every test: the slow ones, the extras (llama.cpp is compiled), the corpora (LMKIT_DATA)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2

# Two workers leave half of two cores idle: most of these tests wait for processes of their own. The longest come first.
faults: $(STAMP)  ## every fault: kills, power cuts, damage, full disks, hostile input; a longer soak with LMKIT_SOAK_S=600
	$(TEST_ENV) $(BIN)/python -m pytest -n 3 --dist worksteal tests/faults/test_soak.py tests/faults tests/golden $(FAULTS_ELSEWHERE)

fuzz: $(STAMP)  ## a minute of coverage-guided fuzzing of what reads files of others (installs atheris; Linux)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-extras.txt atheris
	$(BIN)/python scripts/fuzz.py -max_total_time=60

repro: $(STAMP)  ## train a recipe and evaluate its best checkpoint (CHECKPOINT=latest: its last): make repro RECIPE=ptb_cpu_10min
	$(BIN)/lmkit pretrain recipe=$(RECIPE) run.dir=runs/repro-$(RECIPE)
	$(BIN)/lmkit eval-ppl run=runs/repro-$(RECIPE) run.checkpoint=$(CHECKPOINT) output=runs/repro-$(RECIPE)/test.json

format: $(STAMP)  ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and the caches, not the runs
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
