# Everything a new machine needs is Python 3.11 or later, git and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
TRL := .venv-trl
# A folder of wheels that pip already knows of (pip config) is used for torch as well.
WHEELS := $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)
# On a machine without an accelerator: make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
TORCH := $(shell grep '^torch==' locks/full.lock)
TORCH_FROM := $(if $(WHEELS),--find-links $(WHEELS)) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

export PATH := $(CURDIR)/$(BIN):$(PATH)
# Where this is set, each of the many processes of a run would compile torch and transformers again.
unexport PYTHONDONTWRITEBYTECODE
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1
export GX_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false

.PHONY: help install drive peers trl browser run test test-slow lint report clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: $(VENV)/.installed  ## make the virtual environment from the lock file

$(VENV)/.installed: locks/full.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv || echo "uv is not to be had: pip does it, slower"
	grep -v '^torch==' locks/full.lock > $(VENV)/rest.lock
	@echo "installing the locked packages (one to five minutes)"
	@# uv takes seconds, pip minutes; pip also reads every index that pip is configured for.
	{ test -x $(BIN)/uv \
	  && $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -r $(VENV)/rest.lock \
	  && $(BIN)/uv pip install --quiet --python $(BIN)/python $(TORCH) -c $(VENV)/rest.lock $(TORCH_FROM); } \
	|| { $(BIN)/python -m pip install --quiet --no-compile --no-deps -r $(VENV)/rest.lock \
	  && $(BIN)/python -m pip install --quiet --no-compile $(TORCH) -c $(VENV)/rest.lock $(TORCH_FROM); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

drive: $(VENV)/.drive  ## add MetaDrive (half a gigabyte) to the virtual environment, for the nine driving tasks

$(VENV)/.drive: locks/drive.lock $(VENV)/.installed
	{ test -x $(BIN)/uv && $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -r locks/drive.lock; } \
	|| $(BIN)/python -m pip install --quiet --no-compile --no-deps -r locks/drive.lock
	touch $@

peers: $(PEERS)/.installed  ## make the environment of FSRL and OSRL, for the benchmarks and the client tests

$(PEERS)/.installed: locks/peers.lock | $(VENV)/.installed
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	grep -v '^torch==' locks/peers.lock > $(PEERS)/rest.lock
	{ test -x $(BIN)/uv \
	  && $(BIN)/uv pip install --quiet --python $(PEERS)/bin/python --no-deps -r $(PEERS)/rest.lock \
	  && $(BIN)/uv pip install --quiet --python $(PEERS)/bin/python $(TORCH) -c $(PEERS)/rest.lock $(TORCH_FROM); } \
	|| { $(PEERS)/bin/python -m pip install --quiet --no-compile --no-deps -r $(PEERS)/rest.lock \
	  && $(PEERS)/bin/python -m pip install --quiet --no-compile $(TORCH) -c $(PEERS)/rest.lock $(TORCH_FROM); }
	touch $@

trl: $(TRL)/.installed  ## make the environment of TRL and lm-eval, for the fine-tuning benchmark and the parity tests

$(TRL)/.installed: locks/trl.lock | $(VENV)/.installed
	test -x $(TRL)/bin/python || $(PYTHON) -m venv $(TRL)
	grep -v '^torch==' locks/trl.lock > $(TRL)/rest.lock
	{ test -x $(BIN)/uv \
	  && $(BIN)/uv pip install --quiet --python $(TRL)/bin/python --no-deps -r $(TRL)/rest.lock \
	  && $(BIN)/uv pip install --quiet --python $(TRL)/bin/python $(TORCH) -c $(TRL)/rest.lock $(TORCH_FROM); } \
	|| { $(TRL)/bin/python -m pip install --quiet --no-compile --no-deps -r $(TRL)/rest.lock \
	  && $(TRL)/bin/python -m pip install --quiet --no-compile $(TORCH) -c $(TRL)/rest.lock $(TORCH_FROM); }
	touch $@

# Debian's package; the lineage page is tested in it. Without root, or without a package source, its tests are skipped.
browser:  ## install the Chromium that the page tests drive, where that is possible
	@if test -x /usr/bin/chromium; then :; \
	elif test "$$(id -u)" = 0 && command -v apt-get > /dev/null; then \
	  { apt-get update -qq -o Acquire::http::Timeout=15 && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium; } \
	    > /dev/null 2>&1 || echo "chromium could not be installed: the page tests are skipped"; \
	else echo "no /usr/bin/chromium: the page tests are skipped (as root: apt-get install chromium)"; fi

run: install  ## run the whole pipeline: both branches, from nothing to a promoted model
	springhead run $(ARGS)

test: install browser lint  ## run the checks and the default tests
	python -m pytest -n 2 --dist loadfile

test-slow: install peers trl browser  ## run the long learning tests as well
	python -m pytest -n 2 --dist loadfile -m 'not gpu'

lint: install  ## ruff, mypy, import layers, spelling
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	codespell

report: install  ## build the static HTML report of what is there
	springhead report

clean:  ## remove temporary files; data, cache and ledger stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build *.egg-info
