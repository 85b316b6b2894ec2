# make demo       set up, then run the main job on real data
# make test       set up, then run the tests
# make check      linters, types and unit tests: what to run before a commit
# make lint       linters and types
# make matrix     every optimizer with every scheduler, and every example, killed and resumed; tests take some
# make optimizers the optimizers of 14 packages, and torch's in 450 configurations, killed and resumed
# make bench      the benchmarks, as ratios
# make gpu        the tests and the benchmark that need a CUDA device
# make fuzz       100,000 mutated files, each of which must be answered or refused
# make faults     a training killed, hindered and cut off at every place, each time resumed
# make pictures   run the examples, and keep what they draw and what commands show
# make compat     unit and resume tests with the lowest and with the newest versions that pyproject.toml allows
# make portable   unit tests and types as on macOS and on Windows
# make dist       build wheel and sdist, and install the wheel into an empty environment, with and without torch
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
OPTIMIZERS := .venv-optimizers
PYTEST := $(BIN)/python -m pytest --numprocesses auto
UNIT_TESTS := -m "not integration" tests/unit
RESUME_TESTS := tests/integration/test_resume.py tests/integration/test_resume_matrix.py tests/integration/test_format1.py
LOWEST_PYTHON ?= 3.10
NEWEST_PYTHON ?= 3.13
COMPAT := .venv-compat-lowest .venv-compat-newest

.PHONY: demo test check lint matrix optimizers bench gpu loops rehearsals fuzz faults pictures compat compat-lowest compat-newest portable dist \
	clean

demo: $(VENV)/ready
	$(BIN)/python examples/demo.py

test: $(VENV)/ready
	$(PYTEST) --dist worksteal

check: lint
	$(PYTEST) --dist worksteal $(UNIT_TESTS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

matrix: $(VENV)/ready
	TRACKOPT_MATRIX=full $(PYTEST) --dist worksteal tests/integration/test_resume_matrix.py tests/integration/test_rehearse.py

loops: $(VENV)/ready
	$(BIN)/python -m tests.robustness.loops

rehearsals: $(VENV)/ready
	$(BIN)/python -m tests.robustness.rehearsals

optimizers: $(OPTIMIZERS)/ready
	$(OPTIMIZERS)/bin/python -m tests.robustness.optimizers

$(OPTIMIZERS)/ready: pyproject.toml constraints.txt tests/robustness/optimizers/requirements.txt
	$(PYTHON) -m venv $(OPTIMIZERS)
	$(OPTIMIZERS)/bin/python -m pip install --quiet --constraint constraints.txt --editable .[transformers]
	$(OPTIMIZERS)/bin/python -m pip install --quiet --no-deps --requirement tests/robustness/optimizers/requirements.txt
	touch $@

bench: $(VENV)/ready
	$(BIN)/python -m tests.benchmarks

gpu: $(VENV)/ready
	$(BIN)/python -m pytest tests/integration/test_cuda.py
	$(BIN)/python -m tests.benchmarks gpu

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

compat: compat-lowest compat-newest

# Old versions warn of what newer ones of their dependencies deprecate.
compat-lowest: WARNINGS := -W ignore::DeprecationWarning

compat-lowest compat-newest: compat-%: .venv-compat-%/ready
	$(<D)/bin/python -m pytest --numprocesses auto --dist worksteal $(WARNINGS) $(UNIT_TESTS)
	$(<D)/bin/python -m pytest --numprocesses auto --dist worksteal $(WARNINGS) $(RESUME_TESTS)

.venv-compat-lowest/ready: RESOLUTION := lowest-direct
.venv-compat-lowest/ready: COMPAT_PYTHON := $(LOWEST_PYTHON)
.venv-compat-newest/ready: RESOLUTION := highest
.venv-compat-newest/ready: COMPAT_PYTHON := $(NEWEST_PYTHON)

$(COMPAT:%=%/ready): $(VENV)/ready
	$(BIN)/uv venv --clear --python $(COMPAT_PYTHON) $(@D)
	$(BIN)/uv pip install --python $(@D) --resolution $(RESOLUTION) --editable .
	$(BIN)/uv pip install --python $(@D) --group test
	touch $@

portable: $(VENV)/ready
	for platform in darwin win32; do $(BIN)/mypy --platform $$platform --no-warn-unreachable --cache-dir .mypy_cache/$$platform || exit 1; done
	for system in macos windows; do \
	  TRACKOPT_SYSTEM=$$system $(PYTEST) --dist worksteal $(UNIT_TESTS) || exit 1; \
	done

dist: $(VENV)/ready
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	rm -rf $(VENV)/dist-check && $(PYTHON) -m venv $(VENV)/dist-check
	$(VENV)/dist-check/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd dist && ../$(VENV)/dist-check/bin/trackopt inspect ../tests/helpers/format1/killed
	rm -rf $(VENV)/dist-check && $(PYTHON) -m venv $(VENV)/dist-check
	$(VENV)/dist-check/bin/python -m pip install --quiet --constraint constraints.txt click rich numpy orjson isal
	$(VENV)/dist-check/bin/python -m pip install --quiet --no-deps dist/*.whl
	cd dist && ../$(VENV)/dist-check/bin/trackopt inspect ../tests/helpers/format1/killed
	rm -rf $(VENV)/dist-check

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable .
	touch $@

clean:
	rm -rf $(VENV) $(OPTIMIZERS) $(COMPAT) dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
