# Needs Python >= 3.10 with pip, and make. Everything else is installed into .venv by the first target that wants it.
#   make demo          train the tiny DiT on digits under differential privacy (about three minutes on two cores)
#   make test          ruff, mypy, pytest
#   make opacus-suite  Opacus's own tests on dither.opacus (EXAMPLES=100: all that hypothesis draws by itself)
#   make check         both
#   make docs          the documentation as pages, in site/
#   make bench         step time and peak memory of private training beside other libraries (hours; ARGS=--smoke: minutes)
#   make bench-check   whether a step has become slower than benchmarks/baseline.json says, on quiet cores
#   make sweep         10,000 generated models in every strategy (a quarter of an hour on two cores)
#   make test TORCH=2.6.0        another torch        make test CONSTRAINTS=        no pinned versions

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
TORCH ?=
WORKERS ?= 2
ARGS ?=
BIN := $(VENV)/bin
# The demo takes the small CPU build of torch. The tests need torchvision, as Opacus's do, which goes with these only.
DEMO_TORCH := 2.13.0
TEST_TORCH := $(if $(filter x86_64,$(shell uname -m)),2.14.1,2.9.1)

# Asked for another TORCH or other CONSTRAINTS than last time: forget what is installed.
REQUEST := $(CONSTRAINTS) $(TORCH)
ifneq ($(strip $(REQUEST)),$(strip $(shell cat $(VENV)/.request 2>/dev/null)))
$(shell rm -f $(VENV)/.installed-*)
endif

.PHONY: docs demo test opacus-suite check sweep bench bench-check lint types format clean

demo: $(firstword $(wildcard $(VENV)/.installed-dev) $(VENV)/.installed-cli)
	$(BIN)/dither train $(ARGS)

test: lint types
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

opacus-suite: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -c tests/opacus/suite.ini --pyargs opacus.tests

check: test opacus-suite

sweep: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/properties/sweep.py --cases 10000 --workers $(WORKERS) $(ARGS)

# Tiny sizes write no page: figures of them mean nothing.
RESULTS := $(if $(findstring smoke,$(ARGS)),,--save benchmarks/results.json --page docs/performance.md --picture docs/images/performance.png)
bench: $(VENV)/.installed-bench $(VENV)/jax/.installed
	$(BIN)/dither bench --sweep all --explain --jax_python $(VENV)/jax/bin/python $(RESULTS) $(ARGS)

# A quarter of an hour: fails where a ratio of dither's has grown by more than a tenth.
bench-check: $(VENV)/.installed-bench
	$(BIN)/dither bench --models dit-384 dit-768 dit-256 --contenders auto --pairs 5 --check benchmarks/baseline.json $(ARGS)

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# .installed-cli, .installed-dev, .installed-bench: the package in place with that extra. Modules are compiled when they
# are imported, which most never are.
$(VENV)/.installed-cli: DEFAULT_TORCH := $(DEMO_TORCH)
$(VENV)/.installed-dev $(VENV)/.installed-bench: DEFAULT_TORCH := $(TEST_TORCH)
$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	cat $(or $(CONSTRAINTS),/dev/null) > $(VENV)/constraints.txt
	$(if $(or $(TORCH),$(CONSTRAINTS)),echo "torch==$(or $(TORCH),$(DEFAULT_TORCH))" >> $(VENV)/constraints.txt)
	@echo "Installing dither with its $* extra into $(VENV); a few minutes the first time."
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[$*]'
	@echo '$(REQUEST)' > $(VENV)/.request
	@touch $@

# jax-privacy has an environment of its own: nothing of dither's runs in it.
$(VENV)/jax/.installed: benchmarks/jax.txt
	test -x $(VENV)/jax/bin/python || $(PYTHON) -m venv $(VENV)/jax
	$(VENV)/jax/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/jax.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
