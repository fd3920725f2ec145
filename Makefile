# Everything that a fresh machine with Python 3.11+ needs is done by these targets.
#   make demo   set up, then watch a model answer through a mesh
#   make test   set up with the test tools, then run every test
#   make lint   ruff, mypy (strict), pyright
#   make plots  measure codec and kernels anew, and draw docs/figures (half an hour)
#   make shots  start a mesh, and take docs/traces-*.png of its tracing page
#   make oip-client   an environment of its own for Triton's client, which one test runs
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
SOURCES := services backends kernels cli integration
PROTOS := $(wildcard protos/kvmesh/*/*.proto) protos/hatch_build.py

.PHONY: demo test lint format install bench plots shots clean requirements oip-client

demo: $(VENV)/installed
	$(BIN)/kvmesh demo

install: $(VENV)/installed

# The kernels first: else each of the two processes would compile what both need.
test: $(VENV)/installed-dev
	$(BIN)/python -m kvmesh.kernels.cpu.warm
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(addsuffix /kvmesh,$(SOURCES))
	$(BIN)/pyright

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Triton's client wants protobuf 6, kvmesh takes newer ones too: so it has an environment of its own.
oip-client: $(VENV)/oip-client/installed

$(VENV)/oip-client/installed: $(VENV)/packages
	$(PYTHON) -m venv $(VENV)/oip-client
	$(VENV)/oip-client/bin/python -m pip install --quiet --quiet --disable-pip-version-check \
	  "tritonclient[grpc]>=2.60"
	touch $@

bench: $(VENV)/installed
	$(BIN)/kvmesh bench mesh

plots: $(VENV)/installed
	$(BIN)/kvmesh bench codec --plot docs/figures/codec-kl.svg
	$(BIN)/kvmesh bench kernels --plot docs/figures/kernels-decode.svg

shots: $(VENV)/installed-dev
	$(BIN)/python integration/tests/trace_shots.py docs

# Compiles the kernels once, so that the first mesh starts as fast as the second.
$(VENV)/installed: $(VENV)/packages $(PROTOS) pyproject.toml
	$(PIP) --no-build-isolation --no-deps --editable .
	@echo "compiling the CPU kernels, once (half a minute)"
	$(BIN)/python -m kvmesh.kernels.cpu.warm
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements/dev.txt requirements/parity.txt
	@echo "installing the pinned test tools (a minute)"
	$(PIP) --require-hashes --requirement requirements/dev.txt
	$(PIP) --require-hashes --requirement requirements/parity.txt \
	  || echo "no CPU build of torch for this machine: the tests that need it will be skipped"
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	  && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } \
	  || echo "no chromium: the tests of the tracing page will be skipped"
	touch $@

$(VENV)/packages: requirements/cpu.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	  f"Python {v.major}.{v.minor} is too old, kvmesh needs 3.11 or newer; try make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned packages into $(VENV) (half a minute)"
	$(PIP) --require-hashes --requirement requirements/cpu.txt
	touch $@

# Pins every dependency anew. Needs `uv`; hashes only, so that no index is named.
COMPILE := uv pip compile pyproject.toml --extra cpu --universal --generate-hashes \
  --python-version 3.11 --no-emit-index-url --no-header --quiet
requirements:
	$(COMPILE) --group build --output-file requirements/cpu.txt
	$(COMPILE) --group build --group dev --group cudacc --constraint requirements/cpu.txt \
	  --output-file requirements/dev.txt

clean:
	rm -rf $(VENV) build dist
