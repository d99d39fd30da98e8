# `make demo` and `make test` work as the first command on a fresh clone: each makes .venv and installs what it needs.
# Name another interpreter with `make PYTHON=/path/to/python3 test`, pass arguments to pytest with `make test ARGS="-k rates"`.
# `make VENV=DIR test` runs in an environment of your own, which stays as it is.

VENV := .venv
PY := $(VENV)/bin/python
CANDIDATES := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python3.10 python)
SUITABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))
# What .venv needs for a target: a note in it says that it was installed. An environment of one's own is taken to have it.
needs = $(if $(filter .venv,$(VENV)),$(VENV)/$(1).installed,$(PY))

.PHONY: help demo test quick one named golden lint format types hooks notebooks build mutants lines bench bench-peers bench-cached-head \
    bench-cuda bench-freeze bench-recorder bench-splitters bench-dropout bench-features bench-fused bench-heads bench-checkpoint crash-test \
    dist docs docs-test evidence evidence-quick faults dropout-coverage \
    architectures classifiers clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: $(call needs,demo) ## a real ImageNet network learns handwritten digits in stages
	$(PY) -m fasthaw.demo

help: ## these lines
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Two workers with one torch thread each; MKL and OpenMP read these before torch is imported.
test quick one golden: export OMP_NUM_THREADS := 1
test quick one golden: export MKL_NUM_THREADS := 1
test: $(call needs,dev) ## every test, the slow ones too: under ten minutes on two cores
	$(PY) -m pytest -n 2 --dist worksteal $(ARGS)

quick: $(call needs,dev) ## the tests that are not marked slow: under a minute
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

one: named $(call needs,dev) ## one file in one process: make one T=tests/test_rates.py
	$(PY) -m pytest $(T) $(ARGS)

named:
	@test -n "$(T)" || { echo "say which: make one T=tests/test_rates.py, or T=tests/test_rates.py::test_name" >&2; exit 2; }

golden: $(call needs,dev) ## write every file of tests/golden anew; look at the difference before you commit it
	$(PY) -m pytest -m golden --golden $(ARGS)

lint: $(call needs,lint) ## ruff, which is all that this installs
	$(PY) -m ruff check
	$(PY) -m ruff format --check

format: $(call needs,lint) ## ruff, and it mends what it can
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

types: $(call needs,dev) ## mypy
	$(PY) -m mypy

hooks: $(call needs,lint) ## ruff before every commit
	$(PY) -m pip install --quiet pre-commit
	$(PY) -m pre_commit install

notebooks: $(call needs,dev) ## run the notebooks and write their outputs
	$(PY) tests/notebooks.py nbs/*.ipynb

build: $(call needs,lint) ## a wheel and a source distribution in dist/
	rm -rf dist
	$(PY) -m pip install --quiet build twine
	$(PY) -m build
	$(PY) -m twine check --strict dist/*

# Minutes and gigabytes for each Python, as torch is large; PYTHONS="python3.12" picks some.
dist: build ## the same, and the wheel tried in a new environment of every Python at hand
	$(PY) tests/wheel.py $(PYTHONS)

docs: $(call needs,docs) ## the documentation as pages in build/site
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

docs-test: docs ## the same, opened in a Chromium without a window, light and dark
	$(PY) tests/browse.py build/site

mutants: $(call needs,dev) ## small faults in the lines changed since main: does a test see them? ARGS="--sample 40 --in plan/"
	$(PY) tests/mutants.py $(or $(ARGS),--changed main)

lines: ## how much code there is, module by module; ARGS=v0.1.0 compares with another commit
	$(or $(wildcard $(PY)),python3) tests/code_lines.py $(ARGS)

bench: $(call needs,dev) ## every benchmark, one table with the limits, compared with the run before; ARGS="fused dropout" picks some
	$(PY) -m pip install --quiet lightning finetuning-scheduler transformers accelerate
	$(PY) tests/benchmarks/bench.py $(ARGS)

bench-peers: $(call needs,dev) ## beside a bare loop, Lightning, finetuning-scheduler, the Trainer and fastai; an hour
	$(PY) -m pip install --quiet lightning finetuning-scheduler transformers accelerate
	$(PY) -W ignore tests/benchmarks/bench_peers.py $(ARGS)

bench-cached-head: $(call needs,dev) ## what a cached head epoch costs beside a bare loop
	$(PY) -W ignore tests/benchmarks/bench_cached_head.py $(ARGS)

bench-cuda: $(call needs,dev) ## the figures of a CUDA device, where there is one
	$(PY) -W ignore tests/benchmarks/bench_cuda.py

bench-freeze: $(call needs,dev) ## what a frozen body costs
	$(PY) tests/benchmarks/bench_freeze.py

bench-recorder: $(call needs,dev) ## what GroupRecorder costs
	$(PY) tests/benchmarks/bench_recorder.py

bench-splitters: $(call needs,dev) ## how long it takes to divide a network
	$(PY) tests/benchmarks/bench_splitters.py

bench-dropout: $(call needs,dev) ## what inserted dropout costs
	$(PY) tests/benchmarks/bench_dropout.py

bench-features: $(call needs,dev) ## what cached features save
	$(PY) tests/benchmarks/bench_features.py $(ARGS)

bench-fused: $(call needs,dev) ## what a step of the optimizer costs
	$(PY) -W ignore tests/benchmarks/bench_fused.py $(ARGS)

bench-heads: $(call needs,dev) ## what 32 heads at once cost
	$(PY) -W ignore tests/benchmarks/bench_heads.py $(ARGS)

# Finished runs are kept in .evidence/, the tables are written to tests/evidence/results/.
evidence evidence-quick: export OMP_NUM_THREADS := 1
evidence evidence-quick: export MKL_NUM_THREADS := 1
evidence: $(call needs,evidence) ## what is better, asked of all tasks with five seeds; hours, and it goes on where it stopped
	PYTHONPATH=tests $(PY) -W ignore -m evidence $(ARGS)

evidence-quick: $(call needs,evidence) ## the same of the two small tasks with three seeds; under five minutes
	PYTHONPATH=tests $(PY) -W ignore -m evidence --quick

bench-checkpoint: $(call needs,dev) ## what a plan's run and its checkpoint cost
	$(PY) -W ignore tests/benchmarks/bench_checkpoint.py $(ARGS)

crash-test: $(call needs,dev) ## plans killed at random moments and resumed; ARGS="--scale 0.1" for fewer
	PYTHONPATH=tests $(PY) -W ignore tests/crashes.py $(ARGS)

# Damaged files, signals at any moment, two processes, other data, bad arguments: what goes wrong, counted.
faults: $(call needs,dev) ## what goes wrong with files, signals and arguments; a quarter of an hour; ARGS=checkpoints
	PYTHONPATH=tests $(PY) -W ignore -m faults $(ARGS)

dropout-coverage: $(call needs,dev) ## is dropout after every activation of every network? some minutes
	$(PY) tests/dropout_coverage.py $(ARGS)

architectures: $(call needs,dev) ## are the groups of every network right? an hour; ARGS="timm:resnet50" or ARGS="--shard 1/4 --table F.csv"
	$(PY) tests/architectures.py $(ARGS)

classifiers: $(call needs,dev) ## does every torchvision classifier train through transfer_learner? some minutes
	$(PY) tests/classifiers.py

clean: ## take away all that make has made
	rm -rf .venv build dist lib/*.egg-info .pytest_cache .ruff_cache .mypy_cache
	find lib tests nbs -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

$(PY):
	@test $(VENV) = .venv || { echo "$(VENV) is no environment: there is no $(PY)" >&2; exit 1; }
	@for python in $(CANDIDATES); do \
	    "$$python" -c '$(SUITABLE)' 2>/dev/null && exec "$$python" -m venv $(VENV); \
	done; \
	echo "fasthaw needs Python 3.10 or newer with venv and ensurepip (on Debian and Ubuntu: apt install python3-venv)." >&2; \
	echo "Tried: $(CANDIDATES). Name one that has them: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; \
	exit 1

$(VENV)/lint.installed: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet "$$(grep -o 'ruff==[^"]*' pyproject.toml)"
	@touch $@

$(VENV)/demo.installed: pyproject.toml | $(PY)
	@echo "Installing fasthaw into $(VENV): some minutes the first time, as torch is large."
	$(PY) -m pip install --quiet 'pip>=23'
	$(PY) -m pip install --editable '.[demo]'
	@touch $@

$(VENV)/evidence.installed: pyproject.toml | $(PY)
	@echo "Installing fasthaw into $(VENV): some minutes the first time, as torch is large."
	$(PY) -m pip install --quiet 'pip>=23'
	$(PY) -m pip install --editable '.[evidence]'
	@touch $@ $(VENV)/demo.installed

$(VENV)/dev.installed: pyproject.toml | $(PY)
	@echo "Installing fasthaw into $(VENV): some minutes the first time, as torch is large."
	$(PY) -m pip install --quiet 'pip>=23'
	$(PY) -m pip install --editable '.[dev,demo,timm]'
	@touch $@ $(VENV)/demo.installed $(VENV)/lint.installed

$(VENV)/docs.installed: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet 'pip>=23'
	$(PY) -m pip install --editable '.[docs]'
	@touch $@
