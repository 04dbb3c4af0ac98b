# Everything runs in .venv, which the targets that need it make by themselves (python3 and make are enough).
# Another environment: make test PY=/path/to/python (used as it is, nothing is installed).

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
DEMO_TEACHER := runs/demo/teacher

ifdef PY
SETUP :=
else
PY := $(VENV)/bin/python
SETUP := $(INSTALLED)
endif

.PHONY: help demo test check fix engines bench tables quality gpu-test gpu-report clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(SETUP) ## the whole job on two CPU cores, in minutes: teacher, images, student, baseline, report (runs/demo)
	@$(PY) -m dfkd run --preset demo $(ARGS)

# One torch thread a worker: two that share cores wait for one another.
test: $(SETUP) ## run the tests (ARGS="-k shards" for some)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(SETUP) ## lint, formatting and types; changes nothing
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

fix: $(SETUP) ## put lint and formatting right where that can be done safely
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

engines: $(SETUP) $(DEMO_TEACHER)/result.json ## compile the demo's networks, for this machine and for GPUs (build/engines)
	@$(PY) -m dfkd engines build --set demo $(ARGS)
	@if $(PY) -c "import sys, importlib.util as u; sys.exit(u.find_spec('tensorrt_rtx') is None)"; then \
	  $(PY) -m dfkd engines build --set demo-rtx; \
	else echo "demo-rtx, plans for GPUs: left out, tensorrt_rtx is not installed" >&2; fi

bench: $(SETUP) ## time every part beside a baseline (ARGS="--quick" for minutes, --record, --against FILE)
	@$(PY) -m benchmarks.suite $(ARGS)

tables: $(SETUP) ## write the documents' tables anew from benchmarks/results
	@$(PY) -m benchmarks.tables

quality: $(SETUP) ## students of guided images and of every control, five seeds, hours (runs/quality-demo)
	@$(PY) -m benchmarks.quality demo $(ARGS)

gpu-test: $(SETUP) ## the tests that need a CUDA device
	@$(PY) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" \
	  || { echo "error: torch finds no CUDA device: gpu-test needs one (driver, and a CUDA build of torch)." >&2; exit 2; }
	@$(PY) -m pytest -m gpu --continue-on-collection-errors $$(grep -rl --include='*.py' 'mark\.gpu' tests) $(ARGS)

gpu-report: $(SETUP) ## measure all that only a CUDA device can tell, record it in benchmarks/results (at most eight minutes)
	@$(PY) -m benchmarks.gpu_report $(ARGS)

clean: ## remove the environment, caches and the demo's output
	rm -rf $(VENV) runs dist build/engines .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEMO_TEACHER)/result.json: | $(SETUP)
	@echo "training the demo's teacher first, about a minute: the gradient engine holds it" >&2
	@$(PY) -m dfkd train-teacher --preset demo --seed 0 --out $(DEMO_TEACHER) >&2

$(INSTALLED): pyproject.toml build/constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))" \
	  || { echo "error: $$($(PYTHON) --version) is not 3.11 to 3.13: name one, e.g. make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo "setting up $(VENV) (once; it takes minutes and about 2 GB)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c build/constraints.txt -e '.[dev]' >&2
	@# For tests of teachers alone, out of sight: PyPI's torchvision does not import beside the CPU build of torch.
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c build/constraints.txt \
	  --no-deps --upgrade --target $(VENV)/beside timm torchvision >&2
	@touch $@
