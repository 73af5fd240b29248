# Every target sets itself up: nothing has to be installed or activated first. Set-up is skipped while it is up to date.
PYTHON ?= python3
WORKERS ?= 2
OPTIONS ?=
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
OUTPUT ?= demo-output

.PHONY: demo test oldest constraints extras lint types docs bench format clean

demo: $(VENV)/.demo  ## restore photographs, train on by RL, draw the report (about five minutes)
	$(BIN)/python -m examples.demo --output $(OUTPUT)

test: $(VENV)/.dev  ## the whole test suite, on two processors
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(OPTIONS)

oldest:  ## the fast tests with the oldest versions that pyproject.toml allows, on Python 3.11
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt OPTIONS='-W default -m "not slow"'

constraints:  ## after a change of a lower bound: find the oldest versions again (needs uv)
	uv pip compile --quiet --upgrade --resolution lowest-direct --python-version 3.11 --all-extras --group dev \
		--no-annotate --custom-compile-command "make constraints" pyproject.toml -o constraints-oldest.txt

extras:  ## install and use the core and each extra alone, in fresh environments (40 GB of downloads)
	$(PYTHON) .ci/extras.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright

docs: $(VENV)/.dev  ## build the documentation site into site/
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.dev  ## the classical metrics against every other library (about ten minutes)
	$(BIN)/python -m benchmarks.bench_classical

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-* $(OUTPUT) site build dist .pytest_cache .ruff_cache .hypothesis

# The stamps are remade when what they depend on changes; an interrupted installation leaves none.
$(VENV)/.pip: $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade -c $(CONSTRAINTS) pip
	touch $@

$(VENV)/.demo: pyproject.toml $(CONSTRAINTS) $(VENV)/.pip
	@test -e $(VENV)/.dev || echo "Installing iqareward and its demo into $(VENV): a few minutes, once."
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e . --group demo
	touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) $(VENV)/.pip
	@echo "Installing iqareward, all extras and the development tools into $(VENV): several minutes and 8 GB, once."
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[all,pyiqa]' --group dev
	touch $@ $(VENV)/.demo
