# make demo | test | test-fast | fuzz | lint | bench | tables | clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Pins torch to the version the tests were run with; where an index serves CPU builds this also avoids gigabytes of
# CUDA packages. On a CUDA machine: make setup CONSTRAINTS=
CONSTRAINTS ?= torch==2.13.0
DEMO_OUTPUT ?= demo-output
TABLES_OUTPUT ?= tables-output
JOBS ?= 2
SEED ?= 0
# One thread per process: contended cores are up to ten times slower with two.
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test test-fast fuzz lint bench tables clean

# The name of a stamp holds the constraint, so that another one installs again.
STAMP := $(VENV)/.$(subst =,,$(CONSTRAINTS))
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt

setup: $(STAMP)-dev

# what users need; the rest (tests, linters, and pyradiomics, which needs a C++ compiler) comes on top
$(STAMP)-core: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	printf '%s\n' "$(CONSTRAINTS)" > $(VENV)/constraints.txt
	$(PIP) -e .
	touch $@

$(STAMP)-dev: $(STAMP)-core
	$(PIP) -e '.[dev,pyradiomics]'
	touch $@

demo: $(STAMP)-core
	$(BIN)/lungseg demo data_samples -o $(DEMO_OUTPUT) --jobs $(JOBS)

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --cov=lungseg --cov-report=term:skip-covered --cov-fail-under=85

test-fast: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

fuzz: setup
	$(BIN)/python tests/fuzz/run.py --dicom 1000 --image 300 --seed $(SEED)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python tests/benchmarks/store_compression.py
	$(BIN)/python tests/benchmarks/radiomics_speed.py
	$(BIN)/python tests/benchmarks/radiomics_significance.py
	$(BIN)/python tests/benchmarks/phantom_hardness.py
	$(BIN)/python tests/benchmarks/lung_field.py
	$(BIN)/python tests/benchmarks/real_chest.py
	$(BIN)/python tests/benchmarks/real_series.py
	$(BIN)/python tests/benchmarks/preprocess_speed.py
	$(BIN)/python tests/benchmarks/preprocess_memory.py
	$(BIN)/python tests/benchmarks/lung_masks.py
	$(BIN)/python tests/benchmarks/evaluation_speed.py
	$(BIN)/python tests/benchmarks/interval_coverage.py 300
	$(BIN)/python tests/benchmarks/student_speed.py

tables: $(STAMP)-core
	$(BIN)/lungseg benchmark segmentation -o $(TABLES_OUTPUT) --jobs $(JOBS)
	@cat $(TABLES_OUTPUT)/table-2.md $(TABLES_OUTPUT)/table-3.md

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) $(TABLES_OUTPUT) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
