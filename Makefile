# make demo, make test: everything from a bare Debian 12 machine with Python >= 3.10. make help lists the rest.
PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= $(shell nproc)
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := g++ cmake ninja-build libgtest-dev python3-dev python3-venv
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CXX_SOURCES = $(shell git ls-files 'csrc/*' 'tests/*' | grep -E '\.(h|c|cpp|cu|cuh|hip)$$')

.PHONY: help demo test test-cpp test-aarch64 test-python test-amdgpu benchmark report lint format clean system
help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/installed  ## check the installation and show it at work
	$(BIN)/python -m gemma_norm

test: test-cpp test-python  ## all tests

test-cpp: system  ## checks, plans and kernels through the C interface, on the emulated device too
	cmake -S . -B build/cpp -G Ninja -DCMAKE_BUILD_TYPE=Release
	cmake --build build/cpp -j $(JOBS)
	ctest --test-dir build/cpp --output-on-failure -j $(JOBS)

test-aarch64: PACKAGES += g++-aarch64-linux-gnu qemu-user
test-aarch64: system  ## the CPU kernels' tests, built for AArch64 (NEON) and run in an emulator
	cmake -S . -B build/aarch64 -G Ninja -DCMAKE_TOOLCHAIN_FILE=tests/cpp/aarch64.cmake -DGEMMA_NORM_CUDA=OFF
	cmake --build build/aarch64 -j $(JOBS) --target cpu_test kernel_test
	ctest --test-dir build/aarch64 --output-on-failure -j $(JOBS) -R 'Cpu|/cpu'

test-python: $(VENV)/installed  ## the operators against the float64 oracle
	$(BIN)/python -m pytest -q

test-amdgpu: $(VENV)/installed  ## AMD machine code in an emulator: make test-amdgpu TINYGRAD=<checkout>
	TINYGRAD=$(TINYGRAD) $(BIN)/python -m pytest -q tests/amdgpu

benchmark: $(VENV)/installed  ## beside copy_, eager, torch.compile and the peers that are installed
	$(BIN)/python -m gemma_norm.benchmark

report: $(VENV)/installed  ## tests and benchmark of this machine in one file, report.txt
	( $(BIN)/python -m gemma_norm; $(BIN)/python -m pytest -q tests/python; $(BIN)/python -m gemma_norm.benchmark ) 2>&1 | tee report.txt

lint: $(VENV)/installed  ## ruff, clang-format, mypy
	$(BIN)/pip install -q -e '.[dev]' --no-build-isolation --no-deps
	$(BIN)/pip install -q ruff mypy clang-format==19.1.7
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: $(VENV)/installed  ## put the sources into shape
	$(BIN)/pip install -q ruff clang-format==19.1.7
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:  ## remove what was built
	rm -rf build dist $(VENV) python/*.egg-info python/gemma_norm/lib python/gemma_norm/_build_info.py

# Debian's packages: installed when root, else named. Elsewhere their like is taken for granted.
system:
	@command -v dpkg-query >/dev/null || exit 0; \
	missing=$$(for p in $(PACKAGES); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	[ -z "$$missing" ] && exit 0; \
	if [ $$(id -u) = 0 ]; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	else echo "missing system packages; install them with: sudo apt-get install" $$missing >&2; exit 1; fi

$(BIN)/python: | system
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q '$(TORCH)' 'setuptools>=77' ninja

$(VENV)/installed: $(BIN)/python $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e '.[test,example,amdgpu]'
	@mkdir -p $(@D) && touch $@
