# `make` prints the targets; `make figures` and `make test` set up whatever is missing first.

PROFILE ?= quick
CLUSTER ?= none
ARGS ?=
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(firstword $(foreach p,python3.11 python3 python,$(shell command -v $(p) 2>/dev/null)))
INSTALLED := $(VENV)/installed
FIGURES := $(sort $(foreach nb,$(wildcard nbs/fig*.ipynb),$(firstword $(subst _, ,$(notdir $(nb))))))

# Only the packages of the environment are seen, and its programs come first.
export PYTHONNOUSERSITE := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
PAGES := theory reconstruct explore scaling

.PHONY: help figures $(FIGURES) report theory reconstruct scaling explore sweep sweep-status sweep-plan test validate \
  bench lab data refresh lock clean

help: ## print the targets
	@awk -F ':.*## ' '/^[a-z$$(][^:]*:.*## /{printf "make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "make figNN         one of them: $(FIGURES); with other parameters: make fig02 ARGS=\"-p gamma 0.5\""
	@echo "PROFILE=smoke, quick (the default) or paper chooses the size of the experiments"

figures: $(INSTALLED) ## all figures, into results/$(PROFILE)/, and the page that shows them
	@status=0; $(BIN)/python -m lib.pages.notebooks run $(FIGURES) --profile $(PROFILE) $(ARGS) || status=$$?; \
	  $(BIN)/python -m lib.pages.report --profile $(PROFILE) || status=$$?; exit $$status

report: $(INSTALLED) ## the page of the figures that are there: results/$(PROFILE)/index.html
	@$(BIN)/python -m lib.pages.report --profile $(PROFILE)

theory: $(INSTALLED) ## bilevel learning as a deep equilibrium model with tied weights, in numbers
reconstruct: $(INSTALLED) ## a photograph of your own with the committed kernels: ARGS="-p image photo.jpg"
scaling: $(INSTALLED) ## what a training step costs, by image, kernels, batch and stack

$(FIGURES) theory reconstruct scaling: $(INSTALLED)
	@$(BIN)/python -m lib.pages.notebooks run $@ --profile $(PROFILE) $(ARGS)

explore: $(INSTALLED) ## the grid, one selection at a time, with controls, in JupyterLab
	$(BIN)/jupyter lab nbs/explore.ipynb

sweep: $(INSTALLED) ## train the grid of figures 1, 5 and 6, or what is left of it (CLUSTER=local, slurm: as jobs)
	@$(BIN)/python -m lib.experiments.sweep run --profile $(PROFILE) --cluster $(CLUSTER) $(ARGS)

sweep-status: $(INSTALLED) ## what of the grid is done
	@$(BIN)/python -m lib.experiments.sweep status --profile $(PROFILE) $(ARGS)

sweep-plan: $(INSTALLED) ## what of the grid is left, and how long it will take on this machine
	@$(BIN)/python -m lib.experiments.sweep plan --profile $(PROFILE) $(ARGS)

test: $(INSTALLED) ## lint, types, tests, and the notebooks against their stored output
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(JOBS) --dist worksteal tests $(ARGS)
	$(BIN)/pytest --nbval nbs

validate: $(INSTALLED) ## every notebook executed again, against its stored output
	$(BIN)/pytest --nbval nbs $(ARGS)

bench: $(INSTALLED) ## times beside other implementations and of stacks, errors, digits that hold: results/bench/
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench_training.py
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench_adjoints.py
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench_stacks.py $(ARGS)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench_tolerances.py
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench_reproducibility.py

lab: $(INSTALLED) ## JupyterLab on the notebooks
	$(BIN)/jupyter lab nbs

data: $(INSTALLED) ## fetch and verify the data (the figures do so by themselves)
	@$(BIN)/python -c "from lib.experiments.data import faces, mnist; print(len(mnist('train', 60_000)), len(faces('train', 300)))"

refresh: $(INSTALLED) ## execute the notebooks in place with their defaults, to be committed
	@$(BIN)/python -m lib.pages.notebooks refresh $(FIGURES) $(PAGES)

lock: ## resolve environment.yml anew into requirements.lock
	@$(PYTHON) -m venv --clear $(VENV)-lock
	@sed -n 's/^ *- \([A-Za-z0-9_-]*==.*\)/\1/p' environment.yml > $(VENV)-lock/direct.txt
	@$(VENV)-lock/bin/pip install --quiet --disable-pip-version-check -r $(VENV)-lock/direct.txt
	@{ echo "# The whole resolved set, made by \`make lock\` from environment.yml."; \
	   $(VENV)-lock/bin/pip freeze --exclude pip --exclude setuptools | sed 's/+cpu$$//'; } > requirements.lock
	@rm -rf $(VENV)-lock

clean: ## remove the environment and the results, but neither data nor reference figures
	rm -rf $(VENV) results/runs results/jobs results/smoke results/quick results/paper

$(INSTALLED): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python is missing: install Python 3.11 (python3.11 on the PATH)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1): install Python 3.11 or name it, make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian: python3.11-venv)"; exit 1; }
	@echo "setting up $(VENV) (once, some minutes)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock || \
	  { echo "the packages could not be installed: check the network and run make again"; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable . || \
	  { echo "the repository could not be installed: check the network and run make again"; exit 1; }
	@touch $@
