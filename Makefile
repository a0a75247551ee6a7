# `make train` and `make test` need Python 3.11 or newer and nothing else: each sets up
# .venv first, with the versions in constraints.txt.

PYTHON ?= python3
# cpu, or cuda on a machine with an NVIDIA GPU.
DEVICE ?= cpu

PY := .venv/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
# Beside the environment, not in it: there the plugin would complain of the missing GPU
# at every start of JAX.
export DROPIT_GPU_COMPILER := $(CURDIR)/.venv/gpu-compiler
ifeq ($(DEVICE),cpu)
export JAX_PLATFORMS := cpu
endif

.PHONY: train test lint setup clean

train: setup
	$(PY) -m train.compare --config=configs/digits_resnet18.py \
		--workdir=runs/digits$(if $(filter cuda,$(DEVICE)),-cuda)

test: setup
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

setup: .venv/installed-$(DEVICE)

.venv/installed-cpu .venv/installed-cuda: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name it with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt -e '.[dev$(if $(filter cuda,$(DEVICE)),$(comma)cuda)]'
	$(PIP) install -c constraints.txt --no-deps --upgrade --target .venv/gpu-compiler \
		jax-cuda12-plugin jax-cuda12-pjrt
	@touch $@

comma := ,

clean:
	rm -rf .venv runs
