# Every target makes what it needs: the environment in $(VENV), the model in the user's cache.

VENV ?= .venv
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
PROFILE ?= skeleton
JUDGE ?= build/judge
PROBLEMS ?= 1500
EPOCHS ?= 3
DRAFTS ?= 4
SEEDS ?= 10000
MINUTES ?= 10
SETS ?= orders
METHODS ?= chain,vote4
BUDGETS ?= 512
OUT ?= build/exam
PY = $(VENV)/bin/python
IN_DTYPE = $(if $(DTYPE),--dtype $(DTYPE))

ifndef MODEL
SERVED_NAME = --served-model-name SmolLM2-135M-Instruct
MODEL = "$$($(PY) deploy/local/smollm2.py)"
NEEDS_MODEL = model
endif

# One GiB of KV cache is plenty for a small model; nothing here talks to a model hub.
export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_NO_USAGE_STATS ?= 1
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-slow fuzz soak test-deploy ray-demo dashboard chart-files deploy-tools lint bench bench-parathinker bench-serving bench-hogwild bench-attention exam judge bench-judge env model clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 26
	@echo "Variables: VENV PYTHON MODEL; for serve also HOST PORT PROFILE; for judge JUDGE PROBLEMS EPOCHS DTYPE; for bench-judge also DRAFTS NUM CODE CODE_FILE, RUN_CODE=1; SEEDS for fuzz; OUT for exam; MINUTES for soak; QUICK=1, TUNE=1 for bench-attention"

demo: env $(NEEDS_MODEL) ## one question, answered in parallel branches, beside the plain answer
	@$(PY) deploy/local/demo.py --model $(MODEL)

serve: env $(NEEDS_MODEL) ## an OpenAI-compatible server with the plugin on the CPU
	VLLM_CPU_NUM_OF_RESERVED_CPU=0 PATH="$(abspath $(VENV))/bin:$$PATH" vllm serve $(MODEL) $(SERVED_NAME) \
		--host $(HOST) --port $(PORT) --dtype float32 --enforce-eager \
		--additional-config '{"parallel_think": {"profile": "$(PROFILE)"}}'

ray-demo: env $(NEEDS_MODEL) ## two replicas behind one endpoint with Ray Serve, asked and stopped
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[ray]'
	@$(PY) -m deploy.ray.demo --model $(MODEL)

test: env $(NEEDS_MODEL) ## the tests that run in minutes
	$(PY) -m pytest -m "not slow and not deploy"

test-slow: env $(NEEDS_MODEL) ## the tests that take longer
	$(PY) -m pytest -m slow

fuzz: env ## workers, paths, trees and plain requests mixed, at random, SEEDS times
	$(PY) -m tests.scheduler.mixture --seeds 0:$(SEEDS)

soak: env $(NEEDS_MODEL) ## a server for MINUTES under all profiles, in a pool that is too small: leaks, counts
	$(PY) -m tests.deploy.soak --minutes $(MINUTES)

test-deploy: env $(NEEDS_MODEL) deploy-tools ## real server and Prometheus under load, its page in Chromium, Ray with killed replicas, Helm chart
	$(PY) -m pytest -m deploy

dashboard: env $(NEEDS_MODEL) deploy-tools ## pictures of the dashboard and (in build/) the page, from a load on a real server
	@mkdir -p build
	$(PY) -m tests.deploy.picture --out deploy/grafana/dashboard.png --page build/page.png

chart-files: ## copy rules and dashboard into the Helm chart
	cp deploy/prometheus/rules.yaml deploy/grafana/parallel-think.json deploy/kubernetes/chart/files/

# checkov pins hundreds of versions that are not vLLM's, so it has an environment of its own.
deploy-tools: env ## what test-deploy and dashboard need; prometheus and chromium are the system's
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[deploy,ray]'
	@test -x build/checkov/bin/checkov || { $(PYTHON) -m venv build/checkov && \
		build/checkov/bin/pip install --quiet --disable-pip-version-check 'checkov>=3.3,<4'; }
	@command -v prometheus > /dev/null && command -v promtool > /dev/null || { \
		echo "prometheus and promtool are missing: apt-get install prometheus"; exit 1; }
	@command -v chromium > /dev/null || command -v google-chrome > /dev/null || { \
		echo "chromium is missing: apt-get install chromium"; exit 1; }

lint: env ## style, formatting, types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: env $(NEEDS_MODEL) ## benchmarks of fork and join
	$(PY) -m tests.bench --model $(MODEL)

bench-parathinker: env $(NEEDS_MODEL) ## paths right after the prompt, their summary, and votes
	$(PY) -m tests.bench --model $(MODEL) --only parathinker

bench-serving: env $(NEEDS_MODEL) ## a step of branches through vllm serve, beside plain requests
	$(PY) -m tests.bench --model $(MODEL) --only serving

judge: env $(NEEDS_MODEL) ## train a draft and a judge head for the model, into $(JUDGE)
	$(PY) -m spec_decode collect --model $(MODEL) --out $(JUDGE)/texts.jsonl --num $(PROBLEMS) \
		$(IN_DTYPE)
	$(PY) -m spec_decode distill --model $(MODEL) --data $(JUDGE)/texts.jsonl --out $(JUDGE)/draft \
		--epochs $(EPOCHS) $(IN_DTYPE)
	$(PY) -m spec_decode label --model $(MODEL) --draft $(JUDGE)/draft \
		--data $(JUDGE)/texts.jsonl --out $(JUDGE)/labels.jsonl --per-problem 2 $(IN_DTYPE)
	$(PY) -m spec_decode fit --model $(MODEL) --data $(JUDGE)/labels.jsonl \
		--out $(JUDGE)/judge.safetensors $(IN_DTYPE)

bench-judge: judge ## the judge against standard verification and rules without training
	$(PY) -m tests.bench.judge --model $(MODEL) --draft $(JUDGE)/draft \
		--judge $(JUDGE)/judge.safetensors --picture $(JUDGE)/bench.svg \
		$(if $(NUM),--num $(NUM)) $(if $(CODE),--code $(CODE)) \
		$(if $(CODE_FILE),--code-file "$(CODE_FILE)") \
		--drafts $(DRAFTS) $(if $(RUN_CODE),--run-code) $(IN_DTYPE)

bench-hogwild: env $(NEEDS_MODEL) ## workers that see each other, beside one request and as many plain ones
	VLLM_CPU_KVCACHE_SPACE=5 $(PY) -m tests.bench --model $(MODEL) --only hogwild

bench-attention: env ## attention over a shared prefix; on a GPU all of its measurements
	$(PY) -m tests.bench.attention $(if $(QUICK),--quick) $(if $(TUNE),--tune)

exam: env ## methods compared on a running server: SETS=gsm8k:FILE METHODS=chain,vote4 BUDGETS=512 NUM=50
	$(PY) -m vllm_parallel_think evaluate --base-url http://$(HOST):$(PORT) --sets "$(SETS)" \
		--methods $(METHODS) --budgets $(BUDGETS) $(if $(NUM),--num $(NUM)) --out $(OUT)
	$(PY) -m vllm_parallel_think report $(OUT)

env: ## the virtual environment with CPU vLLM
	@$(PYTHON) deploy/local/environment.py --venv $(VENV)

model: env ## SmolLM2-135M-Instruct as a local folder
	@$(PY) deploy/local/smollm2.py > /dev/null

clean: ## remove .venv, caches and builds; the model stays
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
