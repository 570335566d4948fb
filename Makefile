# make run   installs into .venv and runs the main job on the embedded simulator
# make test  installs into .venv and passes the tests
# make docs  builds the documentation into site/, which opens from disk
# make test-oldest, make test-newest   a part of the tests with the lower bounds of setup.cfg, and with the newest of
#            everything, each in an environment of its own; without torch
# Only Python 3.11+ and git are needed. Packages are installed again only when their lists change.
PYTHON ?= python3
OLDEST_PYTHON ?= python3.11
NEWEST_PYTHON ?= python3.12
BIN := .venv/bin

# What meets other packages' interfaces and takes minutes at most.
VERSION_TESTS := tests/actions tests/data tests/inputs tests/nn tests/parallel tests/policies tests/training tests/test_cli.py \
	tests/runs/test_config.py tests/test_environments.py tests/test_imports.py tests/experiments/test_plan.py

.PHONY: run test docs test-slow test-oldest test-newest lint clean always

run: .venv/run
	$(BIN)/python -m experiments.calvin_abcd $(ARGS)

test: .venv/test lint
	$(BIN)/python -m pytest $(ARGS)

test-slow: .venv/test
	$(BIN)/python -m pytest -m slow $(ARGS)

docs: .venv/test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

test-oldest: .venv-oldest/ready
test-newest: .venv-newest/ready
test-oldest test-newest: test-%:
	.venv-$*/bin/python -m pytest $(VERSION_TESTS) $(ARGS)
	rm -rf .venv-$*/run
	.venv-$*/bin/python -m experiments.calvin_abcd --preset sample --train.steps 20 --train.output .venv-$*/run

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	touch $@

.venv/run: .venv/pip setup.cfg requirements.txt
	$(BIN)/python -m pip install --quiet -c requirements.txt -e .[train]
	touch $@

.venv/test: .venv/pip setup.cfg requirements.txt
	$(BIN)/python -m pip install --quiet -c requirements.txt -e .[test]
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

clean:
	rm -rf .venv .venv-oldest .venv-newest runs
