# make run   installs into .venv and runs the main job on the embedded simulator
# make test  installs into .venv and passes the tests
# Only Python 3.11+ and git are needed. Packages are installed again only when their lists change.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test test-slow lint clean

run: .venv/run
	$(BIN)/python -m experiments.calvin_abcd $(ARGS)

test: .venv/test lint
	$(BIN)/python -m pytest $(ARGS)

test-slow: .venv/test
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	touch $@

.venv/run: .venv/pip setup.cfg requirements.txt
	$(BIN)/python -m pip install --quiet -c requirements.txt -e .
	touch $@

.venv/test: .venv/pip setup.cfg requirements.txt
	$(BIN)/python -m pip install --quiet -c requirements.txt -e .[test]
	touch $@

clean:
	rm -rf .venv runs
