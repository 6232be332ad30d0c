# The front door. `make` alone lists what there is. Python 3.11 or newer, git and make are all it needs:
# every target first makes .venv from requirements.lock if it is not there or the lock has changed.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
READY := $(VENV)/.ready
EXTRAS := lab,live,docs,dev,cluster,arenas
# Everything runs with the environment's own commands, never with others of the same name.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The lock was resolved on 3.11 and holds for 3.12 to 3.14: prefer those, take what else there is.
PYTHONS := python3.11 python3.12 python3.13 python3.14 python3 python
PYTHON ?=

# make tutorial PRESET=gpu
PRESET ?= cpu
# Small products of small matrices are faster on one thread than on two (1.6 ms against 165 ms on a busy machine).
THREADS ?= 1
# nbdev_test itself never gives up, so a stuck notebook is stopped after this many seconds (where `timeout` exists).
NBDEV_SECONDS ?= 1800
TIMEOUT := $(shell command -v timeout >/dev/null 2>&1 && echo timeout $(NBDEV_SECONDS))

.PHONY: help tutorial test clusters lab docs bench play data readme export lock clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

tutorial: $(READY) data ## run nbs/tutorialQA.ipynb as a job (PRESET=cpu) and print its accuracies
	@compute_layers run nbs/tutorialQA.ipynb -p preset $(PRESET)

test: $(READY) data ## run every notebook, then pytest
	OMP_NUM_THREADS=$(THREADS) $(TIMEOUT) nbdev_test
	OMP_NUM_THREADS=$(THREADS) SDL_VIDEODRIVER=dummy python -m pytest -n auto --dist loadfile -m "not cluster" tests

clusters: $(READY) data ## the tests that need quiet cores: a Ray and a Dask cluster that lose a node
	OMP_NUM_THREADS=$(THREADS) python -m pytest tests/test_lab_engines.py -k loses

lab: $(READY) data ## open JupyterLab on the notebooks
	jupyter lab --notebook-dir=. $(LAB_FLAGS)

docs: $(READY) ## build the site into _docs/ from the executed notebooks
	python docs/build.py
	@echo "open _docs/index.html"

bench: $(READY) ## measure the speeds and write bench/results.md
	OMP_NUM_THREADS=$(THREADS) SDL_VIDEODRIVER=dummy python -m bench

play: $(READY) $(if $(WATCH),data) ## play the game with the arrow keys; WATCH=oracle or a name in data/weights/: watch it
	python -m compute_layers.game.play $(if $(WATCH),--watch $(WATCH)) $(if $(WALLS),--walls)

data: $(READY) ## fetch the weights that data.dvc names
	@dvc pull --quiet

readme: $(READY) ## write README.md from nbs/index.ipynb
	python docs/readme.py

export: $(READY) ## write compute_layers/ from the notebooks, and README.md
	nbdev_export
	python docs/readme.py

# The lock holds every package with its exact version, so the first line needs no resolver. The last line only acts
# where the platform asks for more than the lock names, as PyTorch does on a Linux machine with its CUDA libraries.
$(READY): requirements.lock settings.ini setup.py pyproject.toml
	@python='$(PYTHON)'; \
	if [ -z "$$python" ]; then for candidate in $(PYTHONS); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python=$$candidate; break; fi; \
	done; fi; \
	if [ -z "$$python" ]; then \
	  echo 'No Python 3.11 or newer was found. Install one, or name it: make PYTHON=/path/to/python3.11' >&2; exit 1; fi; \
	if ! "$$python" -c 'import venv, ensurepip' 2>/dev/null; then \
	  echo "$$python cannot make virtual environments (Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; fi; \
	echo "Making $(VENV) with $$("$$python" --version): a few minutes, once."; \
	"$$python" -m venv $(VENV)
	@python -m pip install -qq --no-compile --no-deps -r requirements.lock
	@python -m pip install -qq --no-deps --no-build-isolation --editable .
	@python -m pip check >/dev/null || python -m pip install -qq -c requirements.lock --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

# soupsieve 3.0.2 and later refuse Debian 12's Python 3.11.2, and a lock made on a later 3.11 would name them.
lock: ## resolve the extras afresh and rewrite requirements.lock
	@rm -rf $(VENV)-lock
	$${PYTHON:-python3.11} -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet setuptools wheel --editable '.[$(EXTRAS)]' 'soupsieve<3'
	$(VENV)-lock/bin/python -m pip list --format=freeze | grep -viE '^(pip|compute.layers)==' | sed -E 's/\+[a-z0-9.]+$$//' | sort -f > requirements.lock
	@rm -rf $(VENV)-lock

clean: ## remove what the other targets build (never runs/, data/ or .venv)
	rm -rf _docs _proc build .pytest_cache
