# Every target sets up what it needs; a second call costs nothing.
#
# PyTorch is pinned in constraints.txt. Where pip knows an index with PyTorch's
# CPU wheels (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS), it takes those by itself.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Debian's programs that a test starts. They are unpacked, not installed: no root
# is needed, and no service starts by itself. Each is in the package of its name
# unless PACKAGES_… names others, and started by a script that finds its libraries.
DEBIAN := $(VENV)/debian
DEBIAN_PROGRAMS := prometheus redis-server
PACKAGES_redis-server := redis-server redis-tools libatomic1 libjemalloc2 liblzf1
# The load generator of the field's protocol, a test starts it too: it comes inside this old wheel
# of a client, and wants two libraries.
PERF := $(VENV)/perf_analyzer
PERF_WHEELS := tritonclient==2.50.0 nvidia-cuda-runtime-cu12==12.9.79
PERF_PACKAGE := libb64-0d
# KServe's own description of its objects, and Kubernetes' of what is in them: a test reads both
# out of these wheels, and nothing of them is imported.
OBJECTS := $(VENV)/objects
OBJECT_WHEELS := kserve==0.21.0 kubernetes==32.0.1
WHEEL_VENV := .venv-wheel
WHEEL_TESTS := build/wheel-tests
# What the tests of the wheel see of the checkout; never a folder with our code.
WHEEL_TEST_FILES := tests docs README.md pyproject.toml

export PATH := $(CURDIR)/$(BIN):$(PATH):$(CURDIR)/$(DEBIAN)/bin:$(CURDIR)/$(DEBIAN)/usr/bin:$(CURDIR)/$(PERF)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

INSTALL := -m pip install -qq --constraint constraints.txt --build-constraint constraints.txt

# Whole files go to worker processes: fixtures of a module are set up once. Folders in their
# order, so that the files with the longest tests do not come last.
WORKERS ?= 2
PYTEST := -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

SECONDS ?= 600
SEED ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-all chaos bench check format protos wheel test-wheel constraints setup tools clean

help: ## show this page
	@echo "Sluice: stateful streaming inference for LSTM, GRU and RNN models."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "Start with: make demo"

demo: $(READY) ## two minutes: train, export, serve, stream, watch
	@$(BIN)/sluice demo

test: $(READY) tools ## the everyday suite, against this checkout
	@$(BIN)/python $(PYTEST)

test-slow: $(READY) tools ## the tests marked slow: more examples, more rows, every form
	@$(BIN)/python $(PYTEST) -m slow

test-all: test test-slow ## every test there is

chaos: $(READY) tools ## break everything for SECONDS=600, drawn from SEED=1; see docs/reliability.md
	@$(BIN)/python -m tests.chaos --seconds $(SECONDS) --seed $(SEED) \
		--report docs/reliability.md

bench: $(READY) ## measure everything, and write bench/README.md (15 minutes)
	@$(BIN)/python -m bench.report

check: $(READY) ## style, types, and the rules of the layout
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/python -m pytest tests/structure

format: $(READY) ## mend what can be mended of style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

protos: $(READY) ## write the stubs anew from the .proto files
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=protos --grpc_python_out=protos \
		--mypy_out=protos --mypy_grpc_out=protos protos/sluice_protos/*.proto

wheel: $(READY) ## build dist/*.whl, by way of the source distribution
	@rm -rf dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build

test-wheel: wheel tools ## the everyday suite against the built wheel, in a clean environment
	@rm -rf $(WHEEL_TESTS) && mkdir -p $(WHEEL_TESTS)
	@cp -R $(WHEEL_TEST_FILES) $(WHEEL_TESTS)
	@rm -rf $(WHEEL_TESTS)/tests/structure $(WHEEL_TESTS)/tests/deploy $(WHEEL_TESTS)/tests/bench
	@echo "Installing the wheel into $(WHEEL_VENV)"
	@$(BIN)/python -m venv --clear $(WHEEL_VENV)
	@$(WHEEL_VENV)/bin/python -m pip install -qq --constraint constraints.txt pip
	@$(WHEEL_VENV)/bin/python $(INSTALL) --group dev "$$(echo dist/*.whl)[service,export]"
	@cd $(WHEEL_TESTS) && PATH="$(CURDIR)/$(WHEEL_VENV)/bin:$$PATH" \
		$(CURDIR)/$(WHEEL_VENV)/bin/python $(PYTEST)

constraints: $(READY) ## pin what is installed now in constraints.txt
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --all --exclude-editable \
		| sed 's/+cpu$$//'; } > constraints.new && mv constraints.new constraints.txt
	@touch $(READY)

setup: $(READY) ## the virtual environment in .venv, and nothing else

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Sluice needs Python 3.11 \
	(make PYTHON=/path/to/python3.11 …)" >&2; exit 1; }
	@echo "Setting up $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "On Debian: apt-get install python3.11-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install -qq --constraint constraints.txt pip
	@$(BIN)/python $(INSTALL) --group dev --editable '.[service,export]'
	@touch $@

tools: $(DEBIAN_PROGRAMS:%=$(DEBIAN)/bin/%) $(PERF)/perf_analyzer $(OBJECTS)/kserve

# A program that is on the machine already is used as it is. A test that misses
# one fails and names the package, so a failed download is only told here.
$(DEBIAN)/bin/%: | $(READY)
	@mkdir -p $(@D)
	@command -v $* >/dev/null || { echo "Unpacking Debian's $* into $(DEBIAN)"; \
		cd $(DEBIAN) && apt="apt-get -qq -o APT::Sandbox::User=" && \
		packages="$(or $(PACKAGES_$*),$*)" && \
		{ $$apt download $$packages 2>/dev/null || \
			{ $$apt update && $$apt download $$packages; }; } && \
		for package in *.deb; do dpkg -x $$package . && rm $$package; done && \
		printf '%s\n' '#!/bin/sh' 'root=$$(dirname "$$0")/..' \
			'LD_LIBRARY_PATH=$$(echo "$$root"/usr/lib/*-linux-gnu)' \
			'export LD_LIBRARY_PATH' 'exec "$$root/usr/bin/$*" "$$@"' > bin/$* && \
		chmod +x bin/$*; } \
		|| echo "No Debian package of $* could be had: tests that need it will fail." >&2

$(PERF)/perf_analyzer: | $(READY)
	@mkdir -p $(@D)/files
	@command -v perf_analyzer >/dev/null || { echo "Unpacking perf_analyzer into $(PERF)"; \
		python=$(CURDIR)/$(BIN)/python; cd $(@D)/files && \
		$$python -m pip download -qq --no-deps $(PERF_WHEELS) && \
		for wheel in *.whl; do $$python -m zipfile -e $$wheel . && rm $$wheel; done && \
		apt="apt-get -qq -o APT::Sandbox::User=" && \
		{ $$apt download $(PERF_PACKAGE) 2>/dev/null || \
			{ $$apt update && $$apt download $(PERF_PACKAGE); }; } && \
		dpkg -x $(PERF_PACKAGE)_*.deb . && rm *.deb && \
		binary=$$(echo tritonclient-*.data/data/bin/perf_analyzer) && chmod +x $$binary && \
		printf '%s\n' '#!/bin/sh' 'root=$$(dirname "$$0")/files' \
			'LD_LIBRARY_PATH=$$(echo "$$root"/usr/lib/*-linux-gnu):$$root/nvidia/cuda_runtime/lib' \
			'export LD_LIBRARY_PATH' 'exec "$$root/'$$binary'" "$$@"' > ../perf_analyzer && \
		chmod +x ../perf_analyzer; } \
		|| echo "perf_analyzer could not be had: the test that needs it will fail." >&2

$(OBJECTS)/kserve: | $(READY)
	@mkdir -p $(@D)
	@echo "Unpacking KServe's models into $(OBJECTS)"; \
		{ python=$(CURDIR)/$(BIN)/python; cd $(@D) && \
		$$python -m pip download -qq --no-deps $(OBJECT_WHEELS) && \
		for wheel in *.whl; do $$python -m zipfile -e $$wheel . && rm $$wheel; done; } \
		|| echo "KServe's models could not be had: the test that needs them will fail." >&2

clean: ## everything that is not in git
	rm -rf $(VENV) $(WHEEL_VENV) build dist demo-output .pytest_cache .mypy_cache .ruff_cache \
		.hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
