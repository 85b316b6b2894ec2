# make demo       set up, then run the main job on real data
# make test       set up, then run the tests
# make pictures   run the examples, and keep what they draw and what commands show
# make fuzz       100,000 mutated files, each of which must be answered or refused
# make faults     a training killed, hindered and cut off at every place, each time resumed
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test lint bench fuzz faults pictures clean

demo: $(VENV)/ready
	$(BIN)/python examples/demo.py

test: $(VENV)/ready
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/python -m tests.benchmarks

fuzz: $(VENV)/ready
	$(BIN)/python -m tests.robustness.fuzz

faults: $(VENV)/ready
	$(BIN)/python -m tests.robustness.faults

PICTURES := line moons schedules batches finetune optimizers ewma

pictures: $(VENV)/ready
	for name in $(PICTURES); do \
	  rm -rf runs/$$name && $(BIN)/python examples/$$name.py && cp runs/$$name/$$name.png examples/pictures/ || exit 1; \
	done
	$(BIN)/python examples/screens.py

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable .
	touch $@

clean:
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
