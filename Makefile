# `make` alone lists what there is.

PYTHON ?= python3

# Parameters of `make study`, given on the command line. What is left empty is as the notebook's first cell has it.
SAM =
CHECKPOINT =
PREDICTOR =
DETECTOR =
METHODS =
DATASET =
# where it lies, for DATASET=coco, lvis or sa1b
DATA =
N =
# images on which each setting also runs alone, to be timed
TIMED =
SEED =
DEVICE =
# where the work is done: a dask scheduler's address, or how many processes here
SCHEDULER =
WORKERS =
OUT = reports

VENV := .venv
READY := $(VENV)/.requirements-installed
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help study ablation sweeps equal benchmark reports test lessons lint lab app picture readme clean

help:  ## this list
	@echo "Targets:"
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 10 | sed 's/^/  /'
	@echo "Example: make study DATASET=path/to/folder N=50 OUT=path/to/reports"
	@echo "The first one used builds $(VENV) with PYTHON=$(PYTHON), which may be 3.11 to 3.14 (about 8 GB of disk)."

# An option with its text as it was given: a $ in it names no variable of make, a ' ends no string of the shell.
QUOTED = '$(subst ','\'',$(1))'
OPTION = $(if $(2),--$(1) $(call QUOTED,$(2)))
REPORT = $(RUN) -m aopsam_lab.study report $(call OPTION,reports,$(value OUT)) \
  $(call OPTION,sam,$(value SAM)) $(call OPTION,checkpoint,$(value CHECKPOINT)) \
  $(call OPTION,predictor,$(value PREDICTOR)) $(call OPTION,detector,$(value DETECTOR)) \
  $(call OPTION,dataset,$(value DATASET)$(if $(value DATA),:$(value DATA))) \
  $(call OPTION,n-images,$(value N)) $(call OPTION,seed,$(value SEED)) \
  $(call OPTION,device,$(value DEVICE)) $(call OPTION,timed-images,$(value TIMED)) \
  $(call OPTION,scheduler,$(or $(value SCHEDULER),$(value WORKERS)))
# make would hand them to what it starts, and look for variables in them
unexport SAM CHECKPOINT PREDICTOR DETECTOR METHODS DATASET DATA N TIMED SEED DEVICE SCHEDULER WORKERS OUT

study: $(READY)  ## the main comparison: SAM= CHECKPOINT= PREDICTOR= DETECTOR= METHODS= DATASET= DATA= N= TIMED= SEED= DEVICE= SCHEDULER= WORKERS= OUT=
	$(REPORT) $(call OPTION,methods,$(value METHODS)) main_comparison

ablation: $(READY)  ## what each part of AoP-SAM gives: the parameters of study
	$(REPORT) ablation

sweeps: $(READY)  ## what each of the four parameters does: the arguments of study
	$(REPORT) parameter_sweeps

equal: $(READY)  ## AoP-SAM against grids of as many prompts: the arguments of study
	$(REPORT) equal_prompts

benchmark: $(READY)  ## segment_anything's decoding against ours: SAM= CHECKPOINT= DATASET= DATA= N= SEED= DEVICE= OUT=
	$(REPORT) benchmark

reports: study ablation sweeps equal readme  ## all four, and the README's results

test: $(READY)  ## all tests; ARGS="-k name" for some of them
	$(RUN) -m pytest $(ARGS)

lessons: $(READY)  ## all lessons, with the exercises solved
	$(RUN) -m pytest tests/test_lessons.py tests/test_checks.py $(ARGS)

lint: $(READY)  ## style, format and types: ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# glibc gives freed memory back at once: a kernel needs about a tenth less
lab app lessons: export MALLOC_TRIM_THRESHOLD_ = 65536

# the explorer's page sends an image of your own as one message, and the servers' own limit is 10 MB
LIMIT = {'websocket_max_message_size': 268435456}

lab: $(READY)  ## JupyterLab, the explorer open; ARGS="--no-browser --port 8890" for its options
	$(RUN) -m jupyter lab notebooks/explore_pcm_pem.ipynb --ServerApp.root_dir=. \
	  --ServerApp.tornado_settings="$(LIMIT)" $(ARGS)

app: $(READY)  ## the explorer as a page, by Voila; ARGS="--no-browser --port 8891 --theme dark" for its options
	$(RUN) -m voila notebooks/explore_pcm_pem.ipynb --preheat_kernel=True \
	  --Voila.tornado_settings="$(LIMIT)" $(ARGS)

picture: $(READY)  ## reports/explorer.png, the README's picture of the explorer; it needs Chromium
	$(RUN) -m pytest -q tests/test_page.py -k picture
	cp build/browser/explorer.png $(call QUOTED,$(value OUT))/explorer.png

readme: $(READY)  ## write the results of the last study into the README
	$(RUN) -m aopsam_lab.study readme $(call OPTION,reports,$(value OUT))

clean:  ## remove the environment and caches; reports stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Built once, and again when the requirements change. The stamp is written last, so that an interrupted build goes on.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || { \
	  echo "aopsam_lab needs Python 3.11 to 3.14, and $(PYTHON) is not: $$($(PYTHON) --version 2>&1)."; \
	  echo "Name one that is: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --disable-pip-version-check --no-deps --editable .
	@touch $@
