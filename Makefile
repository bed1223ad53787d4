# The commands everybody uses; `make help` lists them. They need Python 3.10 or newer, a C++17 compiler and make: the rest
# comes from the package index into .venv, made by the first command that needs it and brought up to date by the next ones.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The editable install knows each Python file by its name. So the stamp's name depends on these names: after a file was added,
# moved or removed there is no such stamp, and the package is installed again.
STAMP := $(VENV)/.installed-$(shell find src -name '*.py' | LC_ALL=C sort | cksum | cut -d ' ' -f 1)
NVCC := $(firstword $(CUDACXX) $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))

# AUTO: the environment has CUDA kernels where a GPU is, and for that GPU alone. `make cuda` compiles them for every GPU.
ACCEL_CUDA ?= AUTO

BUILD_FILES := pyproject.toml constraints.txt CMakeLists.txt
NATIVE_FILES := $(shell find native -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu*' -o -name CMakeLists.txt \))

.DEFAULT_GOAL := help
.PHONY: help venv demo test fuzz lint format native cuda bench docs cuda-check cuda-site cuda-tests cuda-sanitize clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# What CMake is to find: ninja, and nvcc where it is not on PATH.
$(STAMP) native cuda: export PATH := $(CURDIR)/$(BIN):$(PATH)
ifdef NVCC
export CUDACXX := $(NVCC)
endif

# torch is fixed by constraints.txt and never chosen by pip. Without build isolation CMake and ninja are the environment's,
# at a path that stays, so a second build compiles only what changed.
$(STAMP): $(BUILD_FILES) $(NATIVE_FILES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "scikit-build-core>=1.0" "pybind11>=2.13" "cmake>=3.24" "ninja>=1.11"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation \
	  --config-settings=cmake.define.ACCEL_CUDA=$(ACCEL_CUDA) --editable '.[dev]'
	rm -f $(VENV)/.installed*
	touch $@

venv: $(STAMP)  ## brings .venv up to date, which every command below does by itself

demo: $(STAMP)  ## trains a small network on two processes of this machine
	$(BIN)/python examples/digits.py

test: $(STAMP)  ## the tests; `make test ARGS="tests/unit -k int8"` runs some
	$(BIN)/python -m pytest $(ARGS)

SECONDS ?= 600
fuzz: $(STAMP)  ## random training programs for SECONDS=600, on several ranks; prints what it found
	PYTHONPATH=$(CURDIR)/tests $(BIN)/python -m fuzz.hunt --seconds $(SECONDS) $(ARGS)

lint: $(STAMP)  ## style, formatting and types, Python and C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find native -name '*.h' -o -name '*.cpp' -o -name '*.cu*' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(STAMP)  ## puts Python and C++ into the form that lint asks for
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	find native -name '*.h' -o -name '*.cpp' -o -name '*.cu*' | xargs $(BIN)/clang-format -i

native: $(STAMP)  ## the kernels' own tests, plain and under AddressSanitizer and UBSan
	$(call native-tests,build/native,OFF)
	$(call native-tests,build/native-sanitized,ON)

define native-tests
$(BIN)/cmake -S . -B $(1) -G Ninja -DACCEL_CUDA=OFF -DACCEL_PYTHON=OFF -DACCEL_TESTS=ON -DACCEL_WERROR=ON \
  -DACCEL_SANITIZE=$(2)
$(BIN)/cmake --build $(1)
$(BIN)/ctest --test-dir $(1) --output-on-failure --no-tests=error
endef

ifdef NVCC
cuda: $(STAMP)  ## compiles the CUDA kernels for every architecture, where nvcc is; needs no GPU
	$(call install-into,build/cuda,$(BIN)/python,all-major,--config-settings=cmake.define.CMAKE_CUDA_FLAGS="-Werror all-warnings")
	cd build/cuda/site/lightning_accel && $(CURDIR)/$(BIN)/python -S -c 'import _native as n; assert n.CUDA_ARCHITECTURES; \
	  print("CUDA kernels for", n.CUDA_ARCHITECTURES, "compiled, and the module imports")'
else
cuda:
	@echo "make cuda: skipped, there is no nvcc on PATH, in CUDACXX or in /usr/local/cuda"
endif

# $(1)/site: the package with CUDA kernels, made by the Python $(2) for the architectures $(3), with the options $(4).
define install-into
rm -rf $(1)/site
$(2) -m pip install --quiet --no-index --no-build-isolation --no-deps --target $(1)/site \
  --config-settings=build-dir=$(1)/build --config-settings=cmake.define.ACCEL_CUDA=ON \
  --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=$(3) $(4) .
endef

bench: $(STAMP)  ## the benchmarks, on this machine
	$(BIN)/python benchmarks/run.py $(ARGS)

docs: $(STAMP)  ## docs/ as pages, in build/docs; a broken link stops it
	printf 'site_name: lightning-accel\ndocs_dir: %s/docs\nsite_dir: %s/build/docs\ntheme: readthedocs\n' "$(CURDIR)" "$(CURDIR)" \
	  | $(BIN)/mkdocs build --quiet --strict --config-file -

# Without a package index, in the Python that is there: it must have torch, lightning, pytest, scikit-build-core, pybind11, CMake
# and nvcc. What is installed lies in build/cuda-check alone.
cuda-check: cuda-tests cuda-sanitize  ## on a machine with a GPU: builds for it, tests (kernels under compute-sanitizer too), measures
	$(CHECKED) benchmarks/bench_codecs_cuda.py

CHECKED := PYTHONPATH=$(CURDIR)/build/cuda-check/site $(PYTHON)

cuda-site:
	$(PYTHON) -c 'import torch; assert torch.cuda.is_available(), "make cuda-check needs a GPU that torch can use"'
	$(call install-into,build/cuda-check,$(PYTHON),native)

cuda-tests: cuda-site
	$(CHECKED) -m pytest tests/cuda $(ARGS)

# Each kernel in each codec and type, at ragged sizes. Without torch's cache each tensor is an allocation of its own, so that
# nothing beside it is its neighbour's memory.
SANITIZED := (test_sizes and 1023) or (test_many_segments and 33) or (test_mean_of_rows and 257) or \
  (test_ring_difference and 257) or test_passes
SANITIZER := $(firstword $(shell command -v compute-sanitizer) $(wildcard /usr/local/cuda/bin/compute-sanitizer))

ifdef SANITIZER
cuda-sanitize: cuda-site
	if $(SANITIZER) $(PYTHON) -c 'import torch; torch.zeros(1, device="cuda")'; then \
	  $(call sanitize,memcheck --report-api-errors no) && $(call sanitize,racecheck); \
	else echo "make cuda-check: $(SANITIZER) does not run on this GPU, so memory and races are not checked"; fi
else
cuda-sanitize:
	@echo "make cuda-check: no compute-sanitizer on PATH or in /usr/local/cuda/bin, so memory and races are not checked"
endif

# The tests chosen, under the tool $(1).
define sanitize
PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=$(CURDIR)/build/cuda-check/site \
  $(SANITIZER) --tool $(1) --kernel-name kns=accel --error-exitcode 9 $(PYTHON) -m pytest -q -k '$(SANITIZED)' \
  tests/cuda/test_codecs_cuda.py tests/cuda/test_qadam_cuda.py tests/cuda/test_weights_cuda.py
endef

clean:  ## removes what was built and the environment
	rm -rf build dist $(VENV) .pytest_cache .mypy_cache .ruff_cache
