# A fresh Linux machine needs Python 3.11 or newer with venv, a C and C++ compiler, and make (`make demo` does with Python
# 3.10). Everything else is installed into .venv, and what is expensive to build is kept in $EXPERTIER_CACHE (default
# ~/.cache/expertier).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The first interpreter that really runs: a shim of an uninstalled version is on the PATH, too.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3.13 python3; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)

VENV ?= .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps

# On PyPI, torch for Linux is a large CUDA build. Set TORCH_INDEX to the address of PyTorch's index of CPU wheels to save
# two gigabytes, and because it is what vLLM's CPU build was compiled against; leave it empty where pip is already
# configured to find the build you want.
TORCH_INDEX ?=
TORCH := torch==2.13.0

# The model of `make demo`; empty means: build the small reference model first.
MODEL ?=
DEMO_OUT ?= examples/benchmarks/demo

PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --quiet

.PHONY: help setup demo test lint unit llama-patched clean distclean

help: ## list what can be made
	@echo 'usage: make TARGET [MODEL=model.gguf]'
	@sed -nE 's/^([a-z-]+):.*## (.*)$$/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(STAMPS)/installed $(STAMPS)/vllm ## create .venv with both engines, the tools and Expertier (first time: about 10 minutes)

$(STAMPS)/venv:
	@test -n "$(PYTHON)" || { echo 'No Python 3.10 or newer with venv was found; install one or set PYTHON=/path/to/python3.' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	@touch $@

# The compiled engine is kept outside the repository: a second clone or a cleaned one does not build it again.
$(STAMPS)/engine: $(STAMPS)/venv pyproject.toml examples/setup/build_llama.py
	@wheel="$$($(BIN)/python examples/setup/build_llama.py | tail -n 1)"; \
	echo "installing $${wheel##*/}"; \
	$(PIP_INSTALL) "$$wheel"
	@touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	@echo 'installing $(TORCH)'
	@$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	@touch $@

# pip fetches setuptools for the isolated build; without a registry, install setuptools>=77 into .venv and set
# PIP_NO_BUILD_ISOLATION=0 (pip's spelling of "do not isolate").
$(STAMPS)/installed: $(STAMPS)/engine $(STAMPS)/torch pyproject.toml
	@echo 'installing expertier and its tools'
	@$(PIP_INSTALL) --editable '.[llamacpp,train,test]'
	@touch $@

# Last, because it only adds to what is there. What needs llama.cpp alone, like `make demo`, never downloads it.
$(STAMPS)/vllm: $(STAMPS)/installed examples/setup/install_vllm.py
	@$(BIN)/python examples/setup/install_vllm.py
	@touch $@

# Trained base and product are kept in the cache directory: the second time the script only finds them.
demo: $(STAMPS)/installed ## stock llama.cpp and Expertier side by side under three memory limits
	@model='$(MODEL)'; \
	if [ -z "$$model" ]; then \
		echo 'reference model: trained and widened once (about 4 minutes), then kept'; \
		folder="$$($(BIN)/python -c 'from expertier.paths import cache_dir; print(cache_dir() / "reference")')"; \
		model="$$($(BIN)/python examples/reference_model/build.py --out "$$folder" --size 1GB --type F16 --minutes 3 | sed -n '/\.gguf$$/p')"; \
	fi; \
	$(BIN)/expertier compare "$$model" --engine llamacpp --limit 33% --limit 60% --limit none --quick --out '$(DEMO_OUT)'

test: lint unit ## everything CI runs: linter, formatter, types, all tests

lint: $(STAMPS)/installed $(STAMPS)/vllm ## linter, formatter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Waiting worker threads must not spin: on two shared cores that costs an engine most of its speed. Two at a time, because
# an engine that starts mostly waits; files stay whole, because their tests share engines.
unit: $(STAMPS)/installed $(STAMPS)/vllm
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

llama-patched: $(STAMPS)/venv ## build a llama-cpp-python wheel with the optional patches (patches/README.md)
	@wheel="$$($(BIN)/python examples/setup/build_llama.py --patches patches | tail -n 1)"; \
	echo "patched wheel: $$wheel"; \
	echo "use it:        $(BIN)/python -m pip install --force-reinstall --no-deps $$wheel"; \
	echo "undo:          rm $(STAMPS)/engine && $(BIN)/python -m pip uninstall --yes llama-cpp-python && make setup"

clean: ## remove caches and results of local runs; keeps .venv and everything in the cache directory
	rm -rf build dist *.egg-info plugin/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks $(DEMO_OUT)
	find plugin adapters tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV)
