# GNU make 4 and a POSIX shell. `make` alone lists what there is.
#
# The target of a stage is a file, its checkpoint.json. The stage runs again if its recipe, its data or the checkpoint
# before it is newer. An interrupted run is resumed.

RECIPE ?= recipes/tiny
RUN    ?= runs/$(notdir $(patsubst %/,%,$(RECIPE)))
PYTHON ?= python3
JOBS   ?= 2

BIN  := .venv/bin
RLHF := $(BIN)/rlhf

# On shared cores, threads that spin while they wait slow down every process, their own too.
export OMP_WAIT_POLICY ?= PASSIVE

# A recipe with a prepare.py makes its own base and data. Any other recipe names them in its files, or gets them here.
PREPARE := $(wildcard $(RECIPE)/prepare.py)
ifneq ($(PREPARE),)
PREPARED      := $(RUN)/data/facts.json
BASE          ?= $(RUN)/base
SFT_DATA      ?= $(RUN)/data/sft.jsonl
REWARD_DATA   ?= $(RUN)/data/comparisons.jsonl
PPO_DATA      ?= $(RUN)/data/prompts.jsonl
EVALUATE_DATA ?= $(RUN)/data/heldout.jsonl
endif

SFT    := $(RUN)/sft/checkpoint.json
REWARD := $(RUN)/reward/checkpoint.json
PPO    := $(RUN)/ppo/checkpoint.json
REPORT := $(RUN)/evaluate.json

# $(call dataset,SFT) is the flag; $(call rows,SFT,sft) is the file itself, if the dataset is a file and not a hub id.
dataset = $(if $($(1)_DATA),--dataset $($(1)_DATA))
rows    = $(wildcard $(or $($(1)_DATA),$(shell sed -n 's/^dataset: *\([^ ]*\).*/\1/p' $(RECIPE)/$(2).yaml 2>/dev/null)))

.DEFAULT_GOAL := help
.PHONY: help setup demo sft reward ppo evaluate test test-all lint smoke gpu-check clean
# If interrupted, make must not delete what a stage has just finished.
.PRECIOUS: $(SFT) $(REWARD) $(PPO) $(REPORT)

help: ## show this list
	@printf 'usage: make TARGET [RECIPE=recipes/x] [RUN=runs/x]\n\n'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | while IFS='|' read -r name text; do \
	    printf '  %-10s %s\n' $$name "$$text"; done
	@printf '\n  RECIPE     folder with sft.yaml, reward.yaml, ppo.yaml, evaluate.yaml (%s)\n' '$(RECIPE)'
	@printf '  RUN        folder that the stages write to (%s)\n' '$(RUN)'
	@printf '  FLAGS      flags for every training stage, such as FLAGS="--max-steps 5";\n'
	@printf '             SFT_FLAGS, REWARD_FLAGS, PPO_FLAGS, EVALUATE_FLAGS, PREPARE_FLAGS for one\n'
	@printf '  BASE       base model, and SFT_DATA, REWARD_DATA, PPO_DATA, EVALUATE_DATA, if the\n'
	@printf '             recipe does not name them\n'
	@printf '  PYTHON     what makes .venv (%s), or runs gpu-check without one; JOBS: test processes (%s)\n' \
	    '$(PYTHON)' '$(JOBS)'

# --- the tool ----------------------------------------------------------------------------------------------------

setup: .venv/installed ## make .venv with the tested versions of everything

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	$(BIN)/python -m compileall -q rlhf_cli stages
	@touch $@

# --- the stages --------------------------------------------------------------------------------------------------

demo: $(REPORT) ## base, SFT, reward model, PPO and their report, from scratch, on a CPU
	$(RLHF) report $(RUN)

sft: $(SFT) ## supervised fine-tuning of RECIPE into RUN/sft
reward: $(REWARD) ## the reward model into RUN/reward (and the stages before it)
ppo: $(PPO) ## PPO into RUN/ppo (and the stages before it)
evaluate: $(REPORT) ## PPO against SFT on held-out prompts, into RUN/evaluate.json

$(PREPARED): $(wildcard $(RECIPE)/*.py) | .venv/installed
	$(BIN)/python $(PREPARE) --output $(RUN) $(PREPARE_FLAGS)
	@touch $@

$(SFT): $(RECIPE)/sft.yaml $(PREPARED) $(call rows,SFT,sft) | .venv/installed
	$(RLHF) sft --config $< $(if $(BASE),--model $(BASE)) $(call dataset,SFT) \
	    --output $(@D) --overwrite $(FLAGS) $(SFT_FLAGS)
	@touch $@

$(REWARD): $(RECIPE)/reward.yaml $(SFT) $(call rows,REWARD,reward)
	$(RLHF) reward --config $< --model $(RUN)/sft $(call dataset,REWARD) \
	    --output $(@D) --overwrite $(FLAGS) $(REWARD_FLAGS)
	@touch $@

$(PPO): $(RECIPE)/ppo.yaml $(REWARD) $(call rows,PPO,ppo)
	$(RLHF) ppo --config $< --model $(RUN)/sft --reward $(RUN)/reward $(call dataset,PPO) \
	    --output $(@D) --overwrite $(FLAGS) $(PPO_FLAGS)
	@touch $@

$(REPORT): $(RECIPE)/evaluate.yaml $(PPO) $(call rows,EVALUATE,evaluate)
	$(RLHF) evaluate --config $< --model $(RUN)/ppo --against $(RUN)/sft --reward $(RUN)/reward \
	    $(call dataset,EVALUATE) --output $@ $(EVALUATE_FLAGS)
	@touch $@

# --- checks ------------------------------------------------------------------------------------------------------

# Compiled tests are kept even where Python is told to keep none: compiling them takes longer than importing torch.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

test: .venv/installed ## the fast tests, in a minute and a half
	$(PYTEST)

test-all: .venv/installed ## every test that needs no GPU
	$(PYTEST) -m 'not gpu'

lint: .venv/installed ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

SMALL := --max-steps 2 --batch-size 8 --limit-rows 80 --eval-limit 8 --samples 1
smoke: .venv/installed ## every stage for two steps, in runs/smoke
	rm -rf runs/smoke
	$(MAKE) --no-print-directory demo RECIPE=recipes/tiny RUN=runs/smoke FLAGS='$(SMALL)' \
	    PREPARE_FLAGS='--steps 20 --rows 100' EVALUATE_FLAGS='--limit-rows 8'

# Installs nothing: without a .venv it uses the machine's own Python. The benchmark runs even if a test fails. Each part
# has a time limit; the benchmark writes its results after every model.
GPU_PYTHON    = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_SECONDS  ?= 300
gpu-check: ## GPU tests and GPU benchmark, in under 9 minutes on one CUDA device
	@$(GPU_PYTHON) benchmarks/gpu.py --look
	@failed=0; \
	timeout 200 $(GPU_PYTHON) -m pytest -q --tb=short -m gpu -p no:cacheprovider tests/gpu || failed=1; \
	timeout $$(($(GPU_SECONDS) + 30)) $(GPU_PYTHON) benchmarks/gpu.py --budget-seconds $(GPU_SECONDS) \
	    --output benchmarks/results || failed=1; \
	exit $$failed

clean: ## remove .venv, caches and runs/smoke; other runs stay
	rm -rf .venv runs/smoke build ./*.egg-info .pytest_cache .ruff_cache .hypothesis
	find rlhf_cli stages tests recipes benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
