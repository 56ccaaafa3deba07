PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# timed, or in need of a turn within half a second
ALONE := tests/dist/test_balancer.py tests/dist/test_common_moment.py tests/dist/test_emulation.py \
	tests/dist/test_peer_loss.py $(addprefix tests/dist/test_train_nodes.py::, \
	test_a_worker_that_dies_ends_all_nodes_with_its_error test_an_interrupt_on_one_node_stops_and_saves_on_all) \
	tests/cli/test_train_cmd.py::test_dead_worker_ends_the_run_with_its_error

.PHONY: demo test test-long lint bench clean

demo: $(VENV)/installed
	$(BIN)/python scripts/demo.py

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -m "not long" --numprocesses 2 --dist worksteal $(addprefix --deselect ,$(ALONE))
	$(BIN)/python -m pytest -m "not long" $(ALONE)

test-long: $(VENV)/installed
	$(BIN)/python -m pytest -m long --numprocesses 2 --dist worksteal

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
	$(BIN)/pip install --quiet -c constraints.txt -e '.[plot,text,dev]'
	touch $@
