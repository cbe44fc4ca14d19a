# Every target sets up .venv first; a stamp makes that a no-op until the project files change.
PYTHON ?= python3
BIN := .venv/bin
# an interpreter whose torch finds a CUDA device
GPU_PYTHON ?= $(BIN)/python
STAMP := .venv/.installed
# two processes that keep to neighbouring tests, which share what they prepare; then the slowest tests
PYTEST := $(BIN)/pytest -n 2 --dist worksteal --durations=20 --durations-min=0.5

.PHONY: demo test test-full test-gpu lint bench bench-gpu clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/entropy-probe demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint
	$(PYTEST)

test-full: lint
	$(PYTEST) -m 'not gpu'

# warnings are those of whatever versions the machine has
test-gpu:
	PYTHONPATH=src:$$PYTHONPATH $(GPU_PYTHON) -m pytest -W default -m gpu tests/gpu

bench-gpu:
	PYTHONPATH=src:$$PYTHONPATH $(GPU_PYTHON) benchmarks/gpu.py

bench: $(STAMP)
	$(BIN)/python benchmarks/two_batch.py
	$(BIN)/python benchmarks/one_batch.py
	$(BIN)/python benchmarks/realized.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/attribution.py
	$(BIN)/python benchmarks/inspect_checkpoint.py
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf .venv runs examples/tiny
