# make demo   the whole method on synthetic people: minutes, no downloads beyond the packages
# make test   everything that is checked, notebooks first; BROWSER=1: the companions in a real browser too
# make lab    the notebooks in JupyterLab
# make test-browser   the companion notebooks in a real Chromium, which must be there already
# make stress a small run, killed fifty times at random moments (ARGS="--processes 2": on two processes)
# make docs   the notebooks as a website, in _docs/
# make notebooks   run all notebooks and save their outputs (ARGS="26_losses runs/": these only)
# make sync   notebooks -> package, and notebooks cleaned for git
# make clean  caches and build leftovers (the data, the runs and .venv stay)
#
# Another interpreter for the environment:  make PYTHON=python3.12 demo
# One test only:  make test ARGS="-k 00_core"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.domainmix-installed
ARGS ?=
JUNIT ?=

.PHONY: help demo test test-browser stress lab docs notebooks sync clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed '/^$$/q'

# The packages, once, and again when what the project needs changes. torch and torchvision come in one
# call so that pip picks builds that belong together.
$(STAMP): setup.py settings.ini pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "domainmix needs Python 3.10 or newer, and $(PYTHON) is %d.%d.\n  -> make PYTHON=/path/to/a/newer/python ..." % v[:2])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); } || \
	  { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing what domainmix needs; the first time this takes minutes and about 6.5 GB"
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input -e '.[dev]'
	@$(BIN)/python -c 'import torch, torchvision' || \
	  { echo "torch and torchvision do not fit together: $(BIN)/python -m pip install --force-reinstall torch torchvision" >&2; exit 1; }
	@touch $@

demo: $(STAMP)
	@$(BIN)/domainmix demo

# Two tests at a time, each on one core: more threads only get in each other's way.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(if $(BROWSER),,--ignore=tests/test_browser.py) $(if $(JUNIT),--junitxml="$(JUNIT)") $(ARGS)

test-browser: $(STAMP)
	@command -v chromium chromium-browser google-chrome >/dev/null || { echo "there is no Chromium here; on Debian and Ubuntu: apt-get install --no-install-recommends chromium fonts-dejavu" >&2; exit 1; }
	@$(BIN)/python -c 'import playwright' 2>/dev/null || $(BIN)/python -m pip install --disable-pip-version-check --no-input -e '.[browser]'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_browser.py $(ARGS)

lab: $(STAMP)
	@$(BIN)/jupyter lab nbs

stress: $(STAMP)
	@$(BIN)/python tools/stress.py $(ARGS)

docs: $(STAMP)
	@$(BIN)/python tools/docs.py

notebooks: $(STAMP)
	@$(BIN)/python tools/run_notebooks.py $(ARGS)

sync: $(STAMP)
	@$(BIN)/python tools/sync.py

clean:
	@rm -rf build dist *.egg-info .pytest_cache .hypothesis junit*.xml
	@find domainmix nbs tests tools -name __pycache__ -prune -exec rm -rf {} + -o -name .ipynb_checkpoints -prune -exec rm -rf {} +
