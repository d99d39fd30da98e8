# `make demo` and `make test` work as the first command on a fresh clone: each makes .venv and installs what it needs.
# Name another interpreter with `make PYTHON=/path/to/python3 test`, pass arguments to pytest with `make test ARGS="-k rates"`.

VENV := .venv
PY := $(VENV)/bin/python
CANDIDATES := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python3.10 python)
SUITABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))

.PHONY: demo test lint format notebooks bench-freeze bench-recorder bench-splitters bench-dropout bench-features faults dropout-coverage architectures classifiers clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: $(VENV)/demo.installed
	$(PY) -m fasthaw.demo

# Two workers with one torch thread each; MKL and OpenMP read these before torch is imported.
test: export OMP_NUM_THREADS := 1
test: export MKL_NUM_THREADS := 1
test: $(VENV)/dev.installed
	$(PY) -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/dev.installed
	$(PY) -m ruff check
	$(PY) -m ruff format --check

format: $(VENV)/dev.installed
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

notebooks: $(VENV)/dev.installed
	$(PY) tests/notebooks.py nbs/*.ipynb

bench-freeze: $(VENV)/dev.installed
	$(PY) tests/benchmarks/bench_freeze.py

bench-recorder: $(VENV)/dev.installed
	$(PY) tests/benchmarks/bench_recorder.py

bench-splitters: $(VENV)/dev.installed
	$(PY) tests/benchmarks/bench_splitters.py

bench-dropout: $(VENV)/dev.installed
	$(PY) tests/benchmarks/bench_dropout.py

bench-features: $(VENV)/dev.installed
	$(PY) tests/benchmarks/bench_features.py $(ARGS)

# Damaged files, signals at any moment, two processes, other data, bad arguments: what goes wrong, counted. A quarter of an hour;
# ARGS=checkpoints picks a part.
faults: $(VENV)/dev.installed
	PYTHONPATH=tests $(PY) -W ignore -m faults $(ARGS)

# Is dropout after every activation of every network, and nothing else changed? Some minutes.
dropout-coverage: $(VENV)/dev.installed
	$(PY) tests/dropout_coverage.py $(ARGS)

# Are the layer groups of every architecture right, and do frozen ones stand still in training? An hour for all;
# ARGS="timm:resnet50" picks some.
architectures: $(VENV)/dev.installed
	$(PY) tests/architectures.py $(ARGS)

# Does every torchvision classifier train through transfer_learner? Some minutes.
classifiers: $(VENV)/dev.installed
	$(PY) tests/classifiers.py

clean:
	rm -rf $(VENV) build dist lib/*.egg-info .pytest_cache .ruff_cache
	find lib tests nbs -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

$(PY):
	@for python in $(CANDIDATES); do \
	    "$$python" -c '$(SUITABLE)' 2>/dev/null && exec "$$python" -m venv $(VENV); \
	done; \
	echo "fasthaw needs Python 3.10 or newer with venv and ensurepip (on Debian and Ubuntu: apt install python3-venv)." >&2; \
	echo "Tried: $(CANDIDATES). Name one that has them: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; \
	exit 1

$(VENV)/demo.installed: pyproject.toml | $(PY)
	@echo "Installing fasthaw into $(VENV): some minutes the first time, as torch is large."
	$(PY) -m pip install --quiet 'pip>=23'
	$(PY) -m pip install --editable '.[demo]'
	@touch $@

$(VENV)/dev.installed: pyproject.toml | $(PY)
	@echo "Installing fasthaw into $(VENV): some minutes the first time, as torch is large."
	$(PY) -m pip install --quiet 'pip>=23'
	$(PY) -m pip install --editable '.[dev,demo,timm]'
	@touch $@ $(VENV)/demo.installed
