# make demo       set up, then run the main job on real data
# make test       set up, then run the tests
# make check      linters, types and unit tests: what to run before a commit
# make lint       linters and types
# make matrix     every optimizer with every scheduler, and every example, killed and resumed; tests take some
# make optimizers the optimizers of 14 packages, and torch's in 450 configurations, killed and resumed
# make bench      the benchmarks, as ratios
# make fuzz       100,000 mutated files, each of which must be answered or refused
# make faults     a training killed, hindered and cut off at every place, each time resumed
# make pictures   run the examples, and keep what they draw and what commands show
# make dist       build wheel and sdist, and install the wheel into an empty environment
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
OPTIMIZERS := .venv-optimizers
PYTEST := $(BIN)/python -m pytest --numprocesses auto

.PHONY: demo test check lint matrix optimizers bench fuzz faults pictures dist clean

demo: $(VENV)/ready
	$(BIN)/python examples/demo.py

test: $(VENV)/ready
	$(PYTEST) --dist worksteal

check: lint
	$(PYTEST) --dist worksteal -m "not integration and not distributed and not robustness" tests/unit

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

matrix: $(VENV)/ready
	TRACKOPT_MATRIX=full $(PYTEST) --dist worksteal tests/integration/test_resume_matrix.py tests/integration/test_rehearse.py

optimizers: $(OPTIMIZERS)/ready
	$(OPTIMIZERS)/bin/python -m tests.robustness.optimizers

$(OPTIMIZERS)/ready: pyproject.toml constraints.txt tests/robustness/optimizers/requirements.txt
	$(PYTHON) -m venv $(OPTIMIZERS)
	$(OPTIMIZERS)/bin/python -m pip install --quiet --constraint constraints.txt --editable .[transformers]
	$(OPTIMIZERS)/bin/python -m pip install --quiet --no-deps --requirement tests/robustness/optimizers/requirements.txt
	touch $@

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

dist: $(VENV)/ready
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	rm -rf $(VENV)/dist-check && $(PYTHON) -m venv $(VENV)/dist-check
	$(VENV)/dist-check/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd dist && ../$(VENV)/dist-check/bin/trackopt inspect ../tests/helpers/format1/killed
	rm -rf $(VENV)/dist-check

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable .
	touch $@

clean:
	rm -rf $(VENV) $(OPTIMIZERS) dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
