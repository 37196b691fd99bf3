# Everything on a machine with Python and pip: `make demo` runs the main job, `make test` the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# By file, so that what a module's tests share is made once.
WORKERS := --numprocesses auto --maxprocesses 4 --dist loadfile
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-te test-slow test-gpu gpu-report lint format docs dist clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)
	$(MAKE) test-te
	$(MAKE) test-triton

# Transformer Engine's own Python without a GPU, in a process of its own: it changes torch. See tests/precision/te_cpu.
test-te: $(INSTALLED)
	TE_ON_CPU=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m "not slow" tests/precision/test_te_*.py

# Triton's kernels without a GPU, by its interpreter, which must be asked for before Triton is imported.
test-triton: $(INSTALLED)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m "not slow" tests/optim/test_triton_interpreted.py

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow $(WORKERS) $(TESTS)

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

# On a machine with a CUDA or ROCm GPU: its tests and what a step costs, in gpu_report.md.
gpu-report: $(INSTALLED)
	$(BIN)/python benchmarks/gpu_report.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Nothing is downloaded but the tools; a warning is an error.
docs: $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

# The distributions, and a smoke test of the wheel in an environment of its own.
dist: $(INSTALLED)
	rm -rf dist $(VENV)-dist
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt build
	$(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt torch
	$(VENV)-dist/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt "$$(ls dist/*.whl)[dashboard]"
	cd dist && ../$(VENV)-dist/bin/python ../tests/smoke.py

clean:
	rm -rf $(VENV) $(VENV)-dist dist docs/_build docs/gallery runs .pytest_cache .mypy_cache .ruff_cache

# torch goes first: the version pinned in constraints.txt, before any other package asks for a newer one.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
