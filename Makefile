# `make help` lists what there is to make. Only Python 3.11+ and git are needed. Packages are installed again only when their lists change.
PYTHON ?= python3
OLDEST_PYTHON ?= python3.11
NEWEST_PYTHON ?= python3.12
BIN := .venv/bin

# What meets other packages' interfaces and takes minutes at most.
VERSION_TESTS := tests/actions tests/data tests/inputs tests/nn tests/parallel tests/policies tests/training tests/test_cli.py \
	tests/test_cli_help.py tests/runs/test_config.py tests/test_environments.py tests/test_imports.py tests/experiments/test_plan.py

.PHONY: demo run test docs test-slow test-plans test-oldest test-newest lint types hooks wheel-test clean always help

demo: .venv/demo  ## a robot that obeys sentences, in the browser; nothing is trained
	$(BIN)/python -m experiments.demo $(ARGS)

run: .venv/run  ## the main job: records in the embedded simulator, trains, rolls out; about six minutes on two cores
	$(BIN)/python -m experiments.calvin_abcd $(ARGS)

test: .venv/test lint  ## lint and all tests but the slow ones; about nine minutes on two cores
	$(BIN)/python -m pytest $(ARGS)

test-slow: .venv/test  ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow $(ARGS)

test-plans: .venv-plans/ready  ## a small model compiled for a TPU and a GPU that need not be here; 0.4 GB of compilers
	.venv-plans/bin/python -m pytest -m slow -n 0 tests/experiments/test_targets_compiled.py tests/parallel/test_tpu.py $(ARGS)

docs: .venv/docs  ## the documentation in site/, which opens from disk
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

test-oldest: .venv-oldest/ready  ## a part of the tests with the lower bounds of setup.cfg, without torch
test-newest: .venv-newest/ready  ## the same with the newest of everything
test-oldest test-newest: test-%:
	.venv-$*/bin/python -m pytest $(VERSION_TESTS) $(ARGS)
	rm -rf .venv-$*/run
	.venv-$*/bin/python -m experiments.calvin_abcd --preset sample --train.steps 20 --out .venv-$*/run

lint: .venv/test  ## ruff, and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/typos

types: .venv/dev  ## mypy on what users import (pyproject.toml); most of a minute the first time
	$(BIN)/python -m mypy

hooks: .venv/dev  ## what pre-commit checks before a commit, on every file; `pre-commit install` does it at each commit
	$(BIN)/pre-commit run --all-files

wheel-test: .venv/pip  ## the release: a wheel is built and installed into empty environments, for a robot and to train
	$(BIN)/python tests/wheel.py .venv-wheel

help:  ## this list
	@awk -F':.*  ## ' '/^[a-z-]+:.*  ## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	touch $@

# What is run first is waited for: modules are compiled when they are imported, which is a tenth of all that pip would compile.
.venv/run: .venv/pip setup.cfg requirements.txt
	$(BIN)/python -m pip install --quiet --no-compile -c requirements.txt -e .[train]
	touch $@

.venv/demo: .venv/pip setup.cfg requirements.txt
	$(BIN)/python -m pip install --quiet --no-compile -c requirements.txt -e .[serve]
	touch $@

.venv/docs: .venv/pip setup.cfg requirements.txt
	$(BIN)/python -m pip install --quiet -c requirements.txt -e .[docs]
	touch $@

.venv/test: .venv/pip setup.cfg requirements.txt
	$(BIN)/python -m pip install --quiet -c requirements.txt -e .[test]
	touch $@

.venv/dev: .venv/test
	$(BIN)/python -m pip install --quiet -c requirements.txt -e .[dev]
	touch $@

# Apart from .venv: with these compilers installed JAX takes the machine for one that may have accelerators.
.venv-plans/ready: setup.cfg requirements.txt
	rm -rf .venv-plans
	$(PYTHON) -m venv .venv-plans
	.venv-plans/bin/python -m pip install --quiet -c requirements.txt -e .[test,plan-tpu,plan-gpu]
	touch $@

# Made from nothing, so that no package of the last time stays: the oldest when setup.cfg changes, the newest every time.
.venv-oldest/ready .venv-newest/ready: .venv-%/ready: setup.cfg tests/environments.py
	rm -rf .venv-$*
	$(if $(filter oldest,$*),$(OLDEST_PYTHON),$(NEWEST_PYTHON)) -m venv .venv-$*
	$(PYTHON) tests/environments.py $* > .venv-$*/requirements.txt
	.venv-$*/bin/python -m pip install --quiet --upgrade -r .venv-$*/requirements.txt
	.venv-$*/bin/python -m pip check
	touch $@

.venv-newest/ready: always
always:

clean:  ## away with the environments; runs/ stays
	rm -rf .venv .venv-plans .venv-oldest .venv-newest .venv-wheel
