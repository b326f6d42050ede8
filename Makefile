# Two commands matter: `make run` (set up, serve, profile, plan, apply, load, report) and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup
setup: $(VENV)/.ready

$(VENV)/.ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[cpu,dev]'
	$(BIN)/python -m pip install -q --no-deps nvidia-pytriton==0.7.0
	touch $@
