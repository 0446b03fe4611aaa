# `make` prints the targets. Those that need the environment first install it if it is missing.

PROFILE ?= quick
CLUSTER ?= none
ARGS ?=
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=
PYTHONS := python3.11 python3.12 python3.13
BASE := import sys; print(sys._base_executable); sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
INSTALLED := $(VENV)/installed
FIGURES := $(addprefix fig,01 02 03 04 05 06 07 08 09 10 11 12 13 14 15 16 17)

# Ignore the user's variables and home files of these tools, for the same packages, kernel and styles everywhere;
# keep pip's package sources.
SOURCES := CONFIG_FILE INDEX_URL EXTRA_INDEX_URL NO_INDEX FIND_LINKS CERT CLIENT_CERT PROXY TRUSTED_HOST TIMEOUT \
  DEFAULT_TIMEOUT RETRIES CACHE_DIR KEYRING_PROVIDER
TOOLS := PYTHON% PIP_% PYTEST% HYPOTHESIS% COVERAGE_% RUFF_% MYPY% JUPYTER% JPY_% IPYTHON% PYDEVD_% NBVAL% PAPERMILL% \
  MPL% MATPLOTLIB% PANDAS_% PYDANTIC_% TQDM_%
unexport $(filter-out $(addprefix PIP_,$(SOURCES)),$(filter $(TOOLS),$(.VARIABLES)))
export PYTHONNOUSERSITE := 1
# For a user without a home folder or an entry in passwd.
export HOME ?= $(CURDIR)/$(VENV)/home
export USER ?= user
export JUPYTER_CONFIG_DIR := $(CURDIR)/$(VENV)/jupyter
export JUPYTER_DATA_DIR := $(CURDIR)/$(VENV)/jupyter/data
export IPYTHONDIR := $(CURDIR)/$(VENV)/ipython
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/matplotlib
export PATH := $(CURDIR)/$(BIN):$(PATH)

PYTEST := $(BIN)/python -m pytest -c pyproject.toml

# Without encryption each kernel prints a warning.
LAB := $(BIN)/python -m jupyterlab --KernelManager.transport_encryption=auto

EXECUTE := $(BIN)/python -m nbconvert --to notebook --execute --inplace --KernelManager.transport_encryption=required \
  --ExecutePreprocessor.kernel_name=python3 --ExecutePreprocessor.record_timing=False \
  --ExecutePreprocessor.coalesce_streams=True

.DEFAULT_GOAL := help
PAGES := first_steps your_own theory free_c weight hypergradients reconstruct evaluate tomography explore scaling bsd68

# Notebooks that `make test` executes with their defaults; the tests execute a sample of the figures with `smoke`.
VALIDATED := first_steps your_own theory_special_case reconstruct evaluate explore fig03_mnist_inpainting \
  fig09_kernels_denoising_11x11_bilevel
VALIDATED := $(addsuffix .ipynb,$(VALIDATED))

.PHONY: help figures $(FIGURES) report $(PAGES) train sweep sweep-status sweep-plan check test validate bench gpu lab data \
  refresh keep lock clean delete-runs

help: ## print the targets
	@awk -F ':.*## ' '/^[a-z$$(][^:]*:.*## /{printf "make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "make figNN           one figure: $(FIGURES); with other parameters: make fig02 ARGS=\"-p gamma 0.5\""
	@echo "PROFILE=smoke, quick (default), overnight or paper sets the size of the experiments"

# With `set -f` the shell does not expand brackets in ARGS as file patterns.
figures: $(INSTALLED) ## all figures and their report page, in results/$(PROFILE)/
	@set -f; status=0; $(BIN)/python -m lib.pages.notebooks run $(FIGURES) --profile $(PROFILE) $(ARGS) || status=$$?; \
	  $(BIN)/python -m lib.pages.report --profile $(PROFILE) || status=$$?; exit $$status

report: $(INSTALLED) ## the report page of existing figures: results/$(PROFILE)/index.html
	@$(BIN)/python -m lib.pages.report --profile $(PROFILE)

first_steps: $(INSTALLED) ## the mathematics alone, from an operator to a training, in 60 lines and some seconds
your_own: $(INSTALLED) ## your own potential, operator, physics and prior of DeepInverse, each trained and checked
theory: $(INSTALLED) ## bilevel learning as a deep equilibrium model with tied weights, in numbers
free_c: $(INSTALLED) ## gain of a free C, effect of its start, and DEQs with guarantees
weight: $(INSTALLED) ## effect of a learned weight on the learned models and total variation
hypergradients: $(INSTALLED) ## comparison of hypergradients: solved, Neumann series, Jacobian-free
reconstruct: $(INSTALLED) ## reconstruct your own photograph with the committed kernels: ARGS="-p image photo.jpg"
evaluate: $(INSTALLED) ## evaluate trained kernels on a folder of images: ARGS="-p dataset path/to/BSD68 -p sigma 25"
bsd68: $(INSTALLED) ## learned potentials in the published table: ARGS="-p dataset path/to/Set68"
tomography: $(INSTALLED) ## a task beyond the paper, with an operator of DeepInverse
scaling: $(INSTALLED) ## cost of a training step by image, kernels, batch and stack

# By default glibc returns every large tensor to the system; its pages then cost more time than the arithmetic.
evaluate bsd68 test validate refresh bench: export MALLOC_MMAP_THRESHOLD_ := 4294967296
evaluate bsd68 test validate refresh bench: export MALLOC_TRIM_THRESHOLD_ := 8589934592
evaluate bsd68 test validate refresh bench: export MALLOC_ARENA_MAX := 1

$(FIGURES) first_steps your_own theory free_c weight hypergradients reconstruct evaluate tomography scaling bsd68: $(INSTALLED)
	@set -f; $(BIN)/python -m lib.pages.notebooks run $@ --profile $(PROFILE) $(ARGS)

explore: $(INSTALLED) ## explore the grid with controls in JupyterLab (ARGS: its options)
	@$(LAB) nbs/explore.ipynb $(ARGS)

train: $(INSTALLED) ## train one configuration: ARGS="-p dataset faces -p task deblurring -p model deq"
	@set -f; $(BIN)/python -m lib.experiments train --profile $(PROFILE) $(ARGS)

sweep: $(INSTALLED) ## train the missing runs of the grid of figures 1, 5 and 6 (CLUSTER=local, slurm: as jobs)
	@set -f; $(BIN)/python -m lib.experiments run --profile $(PROFILE) --cluster $(CLUSTER) $(ARGS)

sweep-status: $(INSTALLED) ## count the runs of the grid by status
	@set -f; $(BIN)/python -m lib.experiments status --profile $(PROFILE) $(ARGS)

sweep-plan: $(INSTALLED) ## count missing runs of the grid, and estimate their time on this machine
	@set -f; $(BIN)/python -m lib.experiments plan --profile $(PROFILE) $(ARGS)

# All parts of `check` and `test` run; the last lines have their outcomes.
define LINT
status=0; summary=; trap 'exit 130' INT; \
  part() { name=$$1; shift; echo "== $$name"; outcome=passed; "$$@" || { outcome=FAILED; status=1; }; \
    summary="$$summary$$name: $$outcome\n"; }; \
  part lint $(BIN)/ruff check .; \
  part format $(BIN)/ruff format --check .; \
  part imports $(BIN)/lint-imports --no-cache --no-logo; \
  part types $(BIN)/mypy
endef

check: $(INSTALLED) ## lint, types, tests and examples of the mathematics (after an edit of lib/*.py)
	@$(LINT); \
	  part mathematics $(PYTEST) -n $(JOBS) --dist worksteal tests/mathematics lib/*.py $(ARGS); \
	  printf "\n$$summary"; exit $$status

test: $(INSTALLED) ## lint, types, tests (ARGS: pytest's options), and some notebooks against their stored output
	@$(LINT); \
	  part tests $(PYTEST) -n $(JOBS) --dist worksteal tests lib/*.py $(ARGS); \
	  part notebooks $(PYTEST) --nbval $(addprefix nbs/,$(VALIDATED)) tests/reference.py; \
	  printf "\n$$summary"; exit $$status

validate: $(INSTALLED) ## all notebooks against their stored output, and their numbers against the reference
	$(PYTEST) --nbval nbs tests/reference.py $(ARGS)

bench: $(INSTALLED) ## benchmarks of times, errors and reproducibility, with other implementations: results/bench/
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench/bench_training.py
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench/bench_adjoints.py
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench/bench_stacks.py
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench/bench_tolerances.py
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench/bench_reproducibility.py
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench/bench_upper_level.py
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench/bench_pylopt.py
	@OMP_NUM_THREADS=1 $(BIN)/python tests/bench/bench_published.py

gpu: $(INSTALLED) ## compare a GPU with the CPU (ARGS="--sweep 10" also trains runs for another machine)
	@set -f; $(BIN)/python tests/bench/bench_gpu.py $(ARGS)

lab: $(INSTALLED) ## JupyterLab on the notebooks (ARGS: its options)
	@$(LAB) nbs $(ARGS)

data: $(INSTALLED) ## download and verify the data (figures do so when needed)
	@$(BIN)/python -c "from lib.experiments.data import mnist, split_files; print(len(mnist('train', 60_000)), *map(len, (split_files(name)['train'] for name in ('faces', 'natural'))))"

refresh: $(INSTALLED) ## execute the notebooks in place with their defaults, to commit them
	@$(EXECUTE) $$(git ls-files 'nbs/fig*.ipynb')
	@$(BIN)/python .ci/collect.py
	@$(EXECUTE) $$(git ls-files 'nbs/*.ipynb' ':!nbs/fig*')
	@$(BIN)/python .ci/keep.py $(FIGURES) free_c weight hypergradients evaluate tomography scaling bsd68

keep: $(INSTALLED) ## copy the figures of a profile to the committed folders; with PROFILE=overnight their runs too
	@$(BIN)/python .ci/keep.py $(FIGURES) free_c --profile $(PROFILE)

lock: ## resolve environment.yml into requirements.lock for all versions of Python (PYTHONS: their paths)
	@$(firstword $(PYTHONS)) .ci/lock.py $(PYTHONS)

clean: ## remove the environment and generated figures; keep trained runs
	rm -rf $(VENV) results/smoke results/quick results/overnight results/paper $(addprefix results/,$(PAGES))

delete-runs: ## remove all trained runs
	rm -rf results/runs results/jobs

# The environment records its folder and packages; if these or the requested Python differ, it is rebuilt.
REQUESTED := $(findstring command,$(origin PYTHON))
ifneq ($(shell \
  test "$$(pwd -P; cat requirements.lock)" = "$$(cat $(INSTALLED) 2>&1)" && test -x $(BIN)/python || echo other; \
  $(if $(REQUESTED),test "$$("$(PYTHON)" -V 2>&1)" = "$$($(BIN)/python -V 2>&1)" || echo other)),)
.PHONY: $(INSTALLED)
endif

$(INSTALLED):
	@for python in "$(PYTHON)" $(if $(REQUESTED),,$(PYTHONS) python3 python); do \
	    base=$$("$$python" -c "$(BASE)" 2>/dev/null) && break; base=; done; \
	  test -n "$$base" || { echo "$(or $(PYTHON),the PATH) has no Python 3.11, 3.12 or 3.13 that runs:" \
	    "install Python 3.11, 3.12 or 3.13, or name it: make PYTHON=/path/to/python3.13"; exit 1; }; \
	  if test -f $@; then made=$$(head -n 1 $@); \
	    test "$$made" = "$$(pwd -P)" && made="other packages or another Python" || made="the folder $${made:-of an earlier version}"; \
	    echo "$(VENV) was made for $$made: rebuilding it (some minutes)"; \
	  else echo "setting up $(VENV) (once, some minutes)"; fi; \
	  "$$base" .ci/environment.py $(VENV)
