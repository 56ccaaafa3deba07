PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench clean

demo: $(VENV)/installed
	$(BIN)/python scripts/demo.py

test: $(VENV)/installed lint
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal --ignore tests/dist --ignore tests/cli/test_train_cmd.py
	$(BIN)/python -m pytest tests/dist tests/cli/test_train_cmd.py

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python scripts/bench_all.py

clean:
	rm -rf $(VENV) runs

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[plot,dev]'
	touch $@
