# make demo   run the quick start; write an executed notebook and an HTML page
# make lab    open the quick start in JupyterLab
# make test   run everything that CI runs
# make check  lint, format and types, in seconds
# make failures  let one of two processes fail in 21 ways, for a few minutes
# make nullcuda  test what surrounds a GPU's kernels, without a GPU; 5 GB to install
# make bench  compare speed with a loop written by hand and with other libraries, for over an hour
# make golden compare 49 runs with those of the last commit, bit by bit
# make export write the package and the README from the notebooks

PYTHON ?= python3
VENV ?= .venv
NULLCUDA := .venv-nullcuda
BENCH := .venv-bench
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
BENCH_INSTALL := $(BENCH)/bin/python -m pip install --disable-pip-version-check --quiet -c $(BENCH)/torch.txt
ALONE := tests/kernels tests/notebook tests/browser
SETTINGS := settings.ini pyproject.toml setup.py constraints.txt

.PHONY: demo lab test check failures nullcuda bench golden export notebooks clean

demo: $(VENV)/.notebook
	$(BIN)/python tools/demo.py

lab: $(VENV)/.notebook
	$(BIN)/jupyter lab nbs/tutorials/10_quick_start.ipynb

# One thread each: the runs are small, and threads that share a busy core wait for each other. What
# clicks in kernels and browsers runs apart from what computes.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.dev check
	$(BIN)/nbdev_test --n_workers 2
	$(BIN)/python -m pytest tests $(ALONE:%=--ignore %) -n 2 --dist worksteal
	$(BIN)/python -m pytest $(ALONE) -n 2 --dist worksteal
	$(BIN)/python -m pytest --nbval --nbval-current-env nbs -n 2 --dist loadfile

# The quick checks: lint, format, types.
check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# All failures of one process in every phase; the tests have one phase of each.
failures: export ALL_FAILURES = 1
failures: $(VENV)/.dev
	$(BIN)/python -m pytest tests/ranks/test_failures.py

# PyTorch's build for CUDA, with a GPU that computes nothing. Not in CI, because of its size.
nullcuda: $(NULLCUDA)/.installed
	$(NULLCUDA)/bin/python tests/nullcuda/launch.py -m pytest tests/nullcuda
	$(NULLCUDA)/bin/python tests/nullcuda/launch.py -m pytest tests/device -m gpu

# Options go into BENCH_OPTIONS: make bench BENCH_OPTIONS='--rounds 3 --only U-Net'. It can be stopped
# and started again.
bench: $(BENCH)/.installed $(VENV)/.notebook
	$(BENCH)/bin/python -m benchmarks.peers $(BENCH_OPTIONS)
	$(BIN)/python tools/run_notebooks.py benchmarks/report.ipynb

# The referee: 49 small runs, compared bit by bit with the last commit.
golden: $(VENV)/.dev
	$(BIN)/python tools/golden.py --against HEAD

export: $(VENV)/.dev
	$(BIN)/ruff format nbs tests tools benchmarks
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python tools/readme.py

# Run every notebook and store its outputs, with one thread as in the tests: the last digits differ.
notebooks: export OMP_NUM_THREADS = 1
notebooks: $(VENV)/.dev
	$(BIN)/python tools/run_notebooks.py
	$(MAKE) export

%/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $* || { echo "The virtual environment could not be created. On Debian: apt-get install python3-venv"; exit 1; }
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

# Not the build for the CPU that constraints.txt may find: === is not equal to a version with +cpu.
$(NULLCUDA)/.installed: $(NULLCUDA)/.python $(SETTINGS)
	@echo "Installing PyTorch for CUDA into $(NULLCUDA): gigabytes to fetch, 5 GB on the disk ..."
	$(NULLCUDA)/bin/python -m pip install --disable-pip-version-check --quiet \
	  $$(sed -n 's/^torch==/torch===/p' constraints.txt) -e '.[notebook]' pytest
	@touch $@

# Other libraries have an environment of their own, with the same PyTorch. One that cannot be installed
# is left out. A torchvision that was built for GPUs does not load beside a PyTorch that was not; nobody
# here needs it.
$(BENCH)/.installed: $(BENCH)/.python $(SETTINGS) benchmarks/requirements-peers.txt
	@echo "Installing other libraries into $(BENCH) (some minutes the first time) ..."
	grep '^torch==' constraints.txt > $(BENCH)/torch.txt
	$(BENCH_INSTALL) torch -e .
	@for peer in $$(grep -v '^#' benchmarks/requirements-peers.txt); do \
	  $(BENCH_INSTALL) $$peer || echo "$$peer cannot be installed and is left out."; \
	done
	@! $(BENCH)/bin/python -m pip show --quiet torchvision 2>/dev/null || \
	  $(BENCH)/bin/python -c 'import torchvision' 2>/dev/null || \
	  $(BENCH)/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

clean:
	rm -rf $(VENV) $(NULLCUDA) $(BENCH) _demo build dist *.egg-info
