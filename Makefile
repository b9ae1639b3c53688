# Two commands: `make train` and `make test`. Both make .venv and install into it, unless there is none and this Python
# already has every package they need (a cluster image, say): then they use it as it is and install nothing.
PYTHON ?= python3
TRAIN_NEEDS := torch einops pydantic yaml rich typer numpy psutil datasets tokenizers safetensors
TEST_NEEDS := $(TRAIN_NEEDS) transformers matplotlib jinja2 tensorboard deepspeed pytest xdist ruff mypy x_transformers

# The Python for a command that needs the packages $(1), and what must be made first.
has = $(shell [ ! -e .venv ] && $(PYTHON) -c "import importlib.util as u, sys; \
  sys.exit(any(u.find_spec(name) is None for name in '$(1)'.split()))" 2>/dev/null && echo yes)
ifeq ($(call has,$(TRAIN_NEEDS)),yes)
  TRAIN := $(PYTHON)
else
  TRAIN := .venv/bin/python
endif
ifeq ($(call has,$(TEST_NEEDS)),yes)
  TEST := $(PYTHON)
else
  TEST := .venv/bin/python
endif
ifeq ($(call has,$(TRAIN_NEEDS) pytest),yes)
  GPU := $(PYTHON)
else
  GPU := .venv/bin/python
endif
READY = $(if $(filter .venv/%,$(1)),.venv/.ready)

.PHONY: train test test-slow test-gpu format clean

train: $(call READY,$(TRAIN)) ## train the small model of configs/quickstart.yaml; again: resume, or say it is complete
	$(TRAIN) -m launch train configs/quickstart.yaml

test: $(call READY,$(TEST)) ## format, lint, types and all fast CPU tests
	$(TEST) -m ruff format --check .
	$(TEST) -m ruff check .
	$(TEST) -m mypy
	$(TEST) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(call READY,$(TEST)) ## the longer tests: all engines x layouts x ring sizes, launchers, kills
	$(TEST) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "slow and not gpu"

test-gpu: $(call READY,$(GPU)) ## the tests that need CUDA
	$(GPU) -m pytest -q -m gpu

format: $(call READY,$(TEST))
	$(TEST) -m ruff format . && $(TEST) -m ruff check --fix .

clean: ## remove what was installed; runs and reports stay
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache

.venv/.ready: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "error: $(PYTHON) is \
	  $$($(PYTHON) --version 2>&1), expected Python 3.11 or newer; choose one with make PYTHON=..." >&2; exit 64; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[train,dev]"
	@touch $@
