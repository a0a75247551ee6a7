# `make train` and `make test` need Python 3.11 or newer and nothing else: each sets up
# $(VENV) first, with the versions in constraints.txt.

PYTHON ?= python3
VENV ?= .venv
# cpu, or cuda on a machine with an NVIDIA GPU.
DEVICE ?= cpu

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Beside the environment's packages: dropit_jax/memory/compiled/toolchain.py says why,
# and looks for it here.
COMPILER := $(VENV)/gpu-compiler
ifeq ($(DEVICE),cpu)
export JAX_PLATFORMS := cpu
endif

.PHONY: train test lint setup clean

train: setup
	@$(PY) -m train.compare --config=configs/digits_resnet18.py \
		--workdir=runs/digits$(if $(filter cuda,$(DEVICE)),-cuda)

# Most of the time XLA compiles, and frees millions of small blocks: with its default
# settings glibc takes a tenth of the time to merge them. Others than glibc ignore this.
test: export GLIBC_TUNABLES := glibc.malloc.mxfast=0:glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1
test: setup
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

setup: $(VENV)/installed-$(DEVICE) $(COMPILER)/installed

$(VENV)/installed-cpu $(VENV)/installed-cuda: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name it with make PYTHON=..."; exit 1; }
	@echo "Setting up $(VENV): some minutes, once"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -e '.[dev$(if $(filter cuda,$(DEVICE)),$(comma)cuda)]' \
		> $(VENV)/setup.log 2>&1 || { cat $(VENV)/setup.log; exit 1; }
	@touch $@

# For Linux alone there is one; all else goes on without it.
$(COMPILER)/installed: constraints.txt | $(VENV)/installed-$(DEVICE)
	@rm -rf $(COMPILER)
	@if $(PIP) --target $(COMPILER) jax-cuda12-plugin nvidia-cuda-nvcc-cu12 \
		> $(VENV)/gpu-compiler.log 2>&1; then touch $@; else \
		echo "XLA's GPU compiler, which is for Linux, could not be installed" \
		"($(VENV)/gpu-compiler.log says why): the memory of GPUs stays unknown"; fi

comma := ,

clean:
	rm -rf $(VENV) runs
