# `make` alone lists what there is.

PYTHON ?= python3

# Parameters of `make study`, given on the command line. What is left empty is as the notebook's first cell has it.
SAM =
CHECKPOINT =
METHODS =
DATASET =
N =
SEED =
DEVICE =
OUT = reports

VENV := .venv
READY := $(VENV)/.requirements-installed
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help study test lab readme clean

help:  ## this list
	@echo "Targets:"
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 10 | sed 's/^/  /'
	@echo "Example: make study DATASET=path/to/folder N=50 OUT=path/to/reports"
	@echo "The first one used builds $(VENV) with PYTHON=$(PYTHON), which may be 3.10 to 3.13 (about 8 GB of disk)."

study: $(READY)  ## the main comparison: SAM= CHECKPOINT= METHODS= DATASET= N= SEED= DEVICE= OUT=
	$(RUN) -m aopsam_lab.study report main_comparison --reports '$(OUT)' \
	  $(if $(SAM),--sam '$(SAM)') $(if $(CHECKPOINT),--checkpoint '$(CHECKPOINT)') \
	  $(if $(METHODS),--methods '$(METHODS)') $(if $(DATASET),--dataset '$(DATASET)') \
	  $(if $(N),--n-images '$(N)') $(if $(SEED),--seed '$(SEED)') $(if $(DEVICE),--device '$(DEVICE)')

test: $(READY)  ## all tests; ARGS="-k name" for some of them
	$(RUN) -m pytest $(ARGS)

lab: $(READY)  ## JupyterLab on the notebooks; ARGS="--no-browser --port 8890" for its options
	$(RUN) -m jupyter lab notebooks $(ARGS)

readme: $(READY)  ## write the results of the last study into the README
	$(RUN) -m aopsam_lab.study readme --reports '$(OUT)'

clean:  ## remove the environment and caches; reports stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Built once, and again when the requirements change. The stamp is written last, so that an interrupted build goes on.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "aopsam_lab needs Python 3.10 to 3.13, and $(PYTHON) is not: $$($(PYTHON) --version 2>&1)."; \
	  echo "Name one that is: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --disable-pip-version-check --no-deps --editable .
	@touch $@
