# make demo: install, run the main job, show its table and picture.  make test: install, ruff, types, tests.
# make docs: site/index.html, without a network; warnings are errors.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test slow storm format docs clean

demo: $(VENV)/.all
	$(BIN)/python -m llmsys -m +exp=lorafa_minilm method=full,lora_peft,lorafa_peft
	$(BIN)/python -m llmsys.results results/lorafa_minilm --plot accounted_bytes:accuracy

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2 -m 'not alone and not slow and not gpu'
	$(BIN)/python -m pytest -m 'alone and not slow and not gpu'

slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

# A hundred faults to provider processes, and hundreds of seeded storms in one process.
storm: $(VENV)/.test
	$(BIN)/python -m pytest -m "" tests/decentral -k "storm or arrive"

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# torch first and alone: a package that asks for torch must find this one and not pull another build.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/.all: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[all]'
	touch $@

$(VENV)/.test: $(VENV)/.all
	$(PIP) --editable '.[all,test]'
	touch $@

$(VENV)/.docs: $(VENV)/.all
	$(PIP) --editable '.[all,docs]'
	touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache
