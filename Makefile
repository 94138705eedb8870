# The two commands of a fresh machine are `make demo` and `make test`; `make` alone lists the others.
PYTHON ?= python3
# Where pip may look for torch as well, such as an index of CPU builds; empty: where pip looks anyway.
TORCH_INDEX ?=
RECIPE ?= launch/recipes/smollm2-135m/demo.yaml
# Tests at a time, each with one thread.
TEST_PROCESSES ?= 2

PIP_VERSION := 26.3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# vLLM's own environment, as it wants another transformers; on a cluster its container takes this place.
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
# The opponents of the benchmarks.
PEERS_VENV := .venv-peers
PEERS_STAMP := $(PEERS_VENV)/.installed
# Imported once at the end of the installation, which byte-compiles what is used: sooner done and 0.5 GB smaller
# than letting pip compile everything there is.
USED := torch, deepspeed, peft, datasets, mlflow, matplotlib.pyplot, scipy.stats, lm_eval.models.huggingface, \
        transformers.models.llama.modeling_llama

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install install-vllm install-peers assets gemma llama-cpp demo demo-vllm lint format test test-vllm test-multinode test-services test-matrix bench bench-client \
        bench-generate bench-loss bench-step bench-scaling bench-plan clean clean-venv clean-assets clean-runs
# Where it is set, every start would compile those libraries anew (20 s).
unexport PYTHONDONTWRITEBYTECODE

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "variables: PYTHON=$(PYTHON) TORCH_INDEX=$(TORCH_INDEX) RECIPE=$(RECIPE) TEST_PROCESSES=$(TEST_PROCESSES)"

install: $(STAMP) ## make .venv with the pinned dependencies

$(STAMP): pyproject.toml requirements/core.txt
	@$(PYTHON) -c 'import sys; sys.exit("make: Python 3.11 or newer is needed, this is %s; name one with make PYTHON=..." \
	    % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned dependencies into $(VENV) (2 to 4 minutes)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check pip==$(PIP_VERSION)
	@$(BIN)/python -m pip install --disable-pip-version-check --no-compile \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c requirements/core.txt -e '.[dev]'
	@$(BIN)/python -c 'import $(USED)' > $(VENV)/imports.log 2>&1 || { cat $(VENV)/imports.log; exit 1; }
	@touch $@

install-vllm: $(VLLM_STAMP) ## make .venv-vllm with a CPU build of vLLM, for the server pool

$(VLLM_STAMP): requirements/vllm.txt
	@test -x $(VLLM_VENV)/bin/pip || $(PYTHON) -m venv $(VLLM_VENV)
	@echo "installing the pinned vLLM into $(VLLM_VENV) (2 to 4 minutes)"
	@$(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check pip==$(PIP_VERSION)
	@$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --no-compile \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements/vllm.txt
	@# Built for another torch; vLLM imports them where they are and fails.
	@$(VLLM_VENV)/bin/python -m pip uninstall -qq --disable-pip-version-check -y torchvision torchaudio torchcodec
	@# Byte-compiles what a server uses, so that the first one does not start for minutes.
	@$(VLLM_VENV)/bin/python -c 'import vllm.entrypoints.openai.api_server, vllm.v1.engine.core' \
	    > $(VLLM_VENV)/imports.log 2>&1 || { cat $(VLLM_VENV)/imports.log; exit 1; }
	@touch $@

install-peers: $(PEERS_STAMP) ## make .venv-peers with the libraries that the benchmarks compare with

$(PEERS_STAMP): requirements/peers.txt requirements/peers-alone.txt
	@test -x $(PEERS_VENV)/bin/pip || $(PYTHON) -m venv $(PEERS_VENV)
	@echo "installing the peers into $(PEERS_VENV) (2 to 4 minutes)"
	@$(PEERS_VENV)/bin/python -m pip install -qq --disable-pip-version-check pip==$(PIP_VERSION)
	@$(PEERS_VENV)/bin/python -m pip install --disable-pip-version-check --no-compile \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements/peers.txt
	@# Their own requirements name CUDA packages that a loss on a CPU does not need.
	@$(PEERS_VENV)/bin/python -m pip install --disable-pip-version-check --no-compile --no-deps \
	    -r requirements/peers-alone.txt
	@touch $@

assets: install ## fetch the small public model and the benchmark sets into assets/
	@$(BIN)/python -m launch.assets

gemma: install ## fetch a second real model, Gemma 3 270M, into assets/ (Google's terms of use apply)
	@$(BIN)/python -m launch.assets gemma3-270m

llama-cpp: install ## fetch llama.cpp's converter into assets/, for `recover-lora deliver --gguf`
	@$(BIN)/python -m launch.assets llama.cpp

demo: install assets ## recover a damaged 135M model end to end: 8 to 25 minutes on 2 cores
	@$(BIN)/recover-lora run $(RECIPE)

demo-vllm: install install-vllm assets ## the demo with its corpus drawn by real vLLM servers
	@$(BIN)/recover-lora run $(RECIPE) --set name=smollm2-135m-demo-vllm --set generate.engine=vllm

lint: install ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: install ## let ruff put the code in order
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

test: install assets lint ## lint, types and all tests but the next four, the real model included: 20 minutes
	@# One thread each, or they would wait for one another. The real model's tests go first: they take longest.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-vllm: install install-vllm assets ## server pool, logits processor and a delivered adapter on a real vLLM: 12 minutes
	@$(BIN)/python -m pytest -m vllm

test-multinode: install install-vllm assets ## training on two hosts of this machine: namespaces, real sshd and pdsh; wants root: 20 minutes
	@tests/multinode/install.sh
	@$(BIN)/python -m pytest -m 'multinode and not matrix'

test-services: install ## MLflow on PostgreSQL and its outage, reports and MLflow's pages in a browser; wants root once: 5 minutes
	@tests/services/install.sh
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m services -n $(TEST_PROCESSES) --dist load

test-matrix: install ## the same losses on every layout of ranks, ZeRO stages, teachers and hosts; wants root: 15 minutes
	@tests/multinode/install.sh
	@$(BIN)/python -m pytest tests/multinode/test_layouts.py -m multinode

bench: bench-client bench-generate bench-loss bench-step bench-scaling bench-plan ## every measurement; rows in runs/bench/summary.json

bench-client: install assets ## the pool's client against 64 fake servers with faults
	@$(BIN)/python -m tests.benchmarks.client

bench-generate: install install-vllm assets ## bulk generation on a real vLLM, beside its own benchmark and other samplers
	@$(BIN)/python -m tests.benchmarks.generation

bench-loss: install-peers ## the loss beside its peers: processor time, memory, gradient error
	@OMP_WAIT_POLICY=PASSIVE $(PEERS_VENV)/bin/python -m tests.benchmarks.loss

bench-step: install install-peers assets ## the training step beside its peers, and the cached teachers
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.benchmarks.step

bench-scaling: install assets ## weak scaling from one rank of one thread to two
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.benchmarks.scaling

bench-plan: install assets ## what `recover-lora plan` predicts beside what is measured
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.benchmarks.plan

clean: ## remove caches
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

clean-venv: ## remove .venv, .venv-vllm and .venv-peers
	rm -rf $(VENV) $(VLLM_VENV) $(PEERS_VENV)

clean-assets: ## remove assets/
	rm -rf assets

clean-runs: ## remove runs/ with every artifact in it
	rm -rf runs
