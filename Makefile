# `make demo` and `make test` both start from a machine that has Python 3.11 and nothing else
# (PYTHON=python3.12 takes another; jax 0.11 needs 3.12).
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test test-long lint bench install clean

.venv/.python:
	$(PYTHON) -m venv .venv
	touch $@

# One stamp per set of extras: warm runs install nothing, an edited pyproject.toml installs again.
.venv/.%: pyproject.toml .venv/.python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

install: .venv/.test

demo: .venv/.demo
	$(BIN)/python -m vlm.demo --output=demo_output

# demo-blip, demo-flava, demo-nlvr; NLVR=FOLDER has NLVR's archives.
demo-%: .venv/.demo
	$(BIN)/python -m vlm.demo $* --output=demo_output $(if $(NLVR),--nlvr='$(NLVR)')

lint: .venv/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

test: lint
	$(BIN)/python -m pytest

test-long: .venv/.test
	$(BIN)/python -m pytest -m long

bench: .venv/.test
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf .venv build dist *.egg-info demo_output
