# make demo   run the quick start and leave a notebook and an HTML page
# make lab    open the quick start in JupyterLab
# make test   everything that CI runs
# make export write the package and the README from the notebooks

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
SETTINGS := settings.ini pyproject.toml setup.py constraints.txt

.PHONY: demo lab test check export notebooks format clean

demo: $(VENV)/.notebook
	$(BIN)/python tools/demo.py

lab: $(VENV)/.notebook
	$(BIN)/jupyter lab nbs/tutorials/10_quick_start.ipynb

test: $(VENV)/.dev check
	$(BIN)/nbdev_test --n_workers 0 --do_print
	$(BIN)/python -m pytest tests
	$(BIN)/python -m pytest --nbval --nbval-current-env nbs

# The quick half of the tests: lint, format, types.
check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

export: $(VENV)/.dev
	$(BIN)/ruff format nbs tests tools benchmarks
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python tools/readme.py

# Run every notebook and store its outputs.
notebooks: $(VENV)/.dev
	$(BIN)/python tools/run_notebooks.py
	$(MAKE) export

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "The virtual environment could not be created. On Debian: apt-get install python3-venv"; exit 1; }
	@touch $@

# PyTorch first, with its version from constraints.txt, the only place that sets it.
$(VENV)/.notebook: $(VENV)/.python $(SETTINGS)
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	$(INSTALL) torch
	$(INSTALL) -e '.[notebook]'
	@touch $@

$(VENV)/.dev: $(VENV)/.notebook $(SETTINGS)
	$(INSTALL) -e '.[notebook,dev]'
	@touch $@

clean:
	rm -rf $(VENV) _demo build dist *.egg-info
