# The two commands of a fresh machine are `make demo` and `make test`; `make` alone lists the others.
PYTHON ?= python3
# Where pip may look for torch as well, such as an index of CPU builds; empty: where pip looks anyway.
TORCH_INDEX ?=
RECIPE ?= launch/recipes/smollm2-135m/demo.yaml

PIP_VERSION := 26.3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Imported once at the end of the installation, which byte-compiles what is used: sooner done and 0.5 GB smaller
# than letting pip compile everything there is.
USED := torch, deepspeed, peft, datasets, mlflow, matplotlib.pyplot, scipy.stats, lm_eval.models.huggingface, \
        transformers.models.llama.modeling_llama

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install assets demo lint format test clean clean-venv clean-assets clean-runs
# Where it is set, every start would compile those libraries anew (20 s).
unexport PYTHONDONTWRITEBYTECODE

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "variables: PYTHON=$(PYTHON) TORCH_INDEX=$(TORCH_INDEX) RECIPE=$(RECIPE)"

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

assets: install ## fetch the small public model and the benchmark sets into assets/
	@$(BIN)/python -m launch.assets

demo: install assets ## recover a damaged 135M model end to end: 20 minutes on 2 cores
	@$(BIN)/recover-lora run $(RECIPE)

lint: install ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: install ## let ruff put the code in order
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

test: install assets lint ## lint, types and all tests, the real model included
	@$(BIN)/python -m pytest

clean: ## remove caches
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

clean-venv: ## remove .venv
	rm -rf $(VENV)

clean-assets: ## remove assets/
	rm -rf assets

clean-runs: ## remove runs/ with every artifact in it
	rm -rf runs
