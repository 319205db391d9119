# Every target makes what it needs: the environment in $(VENV), the model in the user's cache.

VENV ?= .venv
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
PROFILE ?= skeleton
PY = $(VENV)/bin/python

ifndef MODEL
MODEL = "$$($(PY) deploy/local/smollm2.py)"
NEEDS_MODEL = model
endif

# One GiB of KV cache is plenty for a small model; nothing here talks to a model hub.
export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_NO_USAGE_STATS ?= 1
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-slow lint bench bench-attention env model clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20
	@echo "Variables: VENV PYTHON MODEL; for serve also HOST PORT PROFILE; QUICK=1 for a small bench-attention"

demo: env $(NEEDS_MODEL) ## one question, answered in parallel branches, beside the plain answer
	@$(PY) deploy/local/demo.py --model $(MODEL)

serve: env $(NEEDS_MODEL) ## an OpenAI-compatible server with the plugin on the CPU
	VLLM_CPU_NUM_OF_RESERVED_CPU=0 PATH="$(abspath $(VENV))/bin:$$PATH" vllm serve $(MODEL) \
		--host $(HOST) --port $(PORT) --dtype float32 --enforce-eager \
		--additional-config '{"parallel_think": {"profile": "$(PROFILE)"}}'

test: env $(NEEDS_MODEL) ## the tests that run in minutes
	$(PY) -m pytest -m "not slow"

test-slow: env $(NEEDS_MODEL) ## the tests that take longer
	$(PY) -m pytest -m slow

lint: env ## style, formatting, types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: env $(NEEDS_MODEL) ## all benchmarks
	$(PY) -m tests.bench --model $(MODEL)

bench-attention: env ## attention over a shared prefix; on a GPU all of its measurements
	$(PY) -m tests.bench.attention $(if $(QUICK),--quick)

env: ## the virtual environment with CPU vLLM
	@$(PYTHON) deploy/local/environment.py --venv $(VENV)

model: env ## SmolLM2-135M-Instruct as a local folder
	@$(PY) deploy/local/smollm2.py > /dev/null

clean: ## remove .venv, caches and builds; the model stays
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
