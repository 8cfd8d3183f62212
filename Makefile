# Every target sets itself up: .venv is created, and refreshed when pyproject.toml changes.
# PYTHON picks the interpreter the environment is made with (3.11 or newer).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet

# Idle threads sleep: on a machine that does other work too, spinning ones slow PyTorch down many times over.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test test-nightly lint bench dist clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

$(STAMP): pyproject.toml
	@echo "Setting up $(VENV) (once; PyTorch is a large download)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --editable ".[daemon,server,mirror,mlflow,signing,dev]"
	@touch $@

demo: $(STAMP)  ## drop sample images, watch them learnt, exported and swapped under a live client
	$(BIN)/python examples/demo/demo.py

test: $(STAMP)  ## the everyday tests
	$(BIN)/python -m pytest -m "not nightly" --numprocesses 2 --dist loadfile

test-nightly: $(STAMP)  ## the long tests, before a release
	$(BIN)/python -m pytest -m nightly

lint: $(STAMP)  ## ruff, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples/demo

bench: $(STAMP)  ## measure on the full image packs of ../shared/data
	$(BIN)/python -m benchmarks.stages
	$(BIN)/python -m benchmarks.publish
	$(BIN)/python -m benchmarks.swap
	$(BIN)/python -m benchmarks.sessions
	$(BIN)/python -m benchmarks.undo
	$(BIN)/python -m benchmarks.unknown
	$(BIN)/python -m benchmarks.serve
	$(BIN)/python -m benchmarks.inbox
	$(BIN)/python -m benchmarks.native_inbox
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.stream

dist: $(STAMP)  ## the wheel, and the systemd units as an archive, in dist/
	rm -rf build dist
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m daemon.unit_archive dist

clean:  ## remove .venv, caches and the demo's home
	rm -rf $(VENV) demo-home build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
