PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# needs a launcher that gets its turn within half a second
ALONE := tests/cli/test_train_cmd.py::test_dead_worker_ends_the_run_with_its_error

.PHONY: demo test lint bench clean

demo: $(VENV)/installed
	$(BIN)/python scripts/demo.py

test: $(VENV)/installed lint
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal --ignore tests/dist --deselect $(ALONE)
	$(BIN)/python -m pytest tests/dist $(ALONE)

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
