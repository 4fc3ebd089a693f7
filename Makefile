# make demo   everything from a fresh clone: images, classifier, adapter, table, pictures, report
# make paper  the long run, behind an estimate of its time: further rows, the sweep of gamma, the strength dial, the page on all methods
# make doctor checks the pieces in RESULTS (a folder of results/ with classifier, cells.json, dataset), and what training on them takes
# make pull   the recorded results, from DVC's remote, checked byte for byte (docs/dvc.md)
# make play   a page in the browser to play with the adapter in RESULTS: prompt, label, strength, seed
# make ui     MLflow's pages on what the runs logged
# make test   all tests;  make lint  style
PYTHON ?= python3
CORES ?= all
PORT ?= 5000
UI_HOST ?= 127.0.0.1
VENV := .venv
BIN := $(VENV)/bin
RESULTS := results/compressibility
PLAY := $(VENV)/play
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo paper doctor pull play test lint ui format
.DEFAULT_GOAL := demo

# --no-compile: Python compiles what is imported; all of it would take a minute.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; name another by make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	touch $@

# On top of $(VENV), whose packages it sees: what gradio needs, some of it in other versions.
$(PLAY)/.installed: $(VENV)/.installed constraints-play.txt
	$(BIN)/python -m venv $(PLAY)
	realpath $(VENV)/lib/python3*/site-packages > $$(echo $(PLAY)/lib/python3*/site-packages)/below.pth
	$(PLAY)/bin/python -m pip install --quiet --no-compile -c constraints-play.txt gradio
	touch $@

demo: $(VENV)/.installed
	snakemake --cores $(CORES) all
	snakemake --report $(RESULTS)/report.html all
	@dvc commit --force --quiet || echo "DVC did not record this run (it needs a git checkout)" >&2
	@echo
	@cat $(RESULTS)/tables/results.md
	@echo
	@echo "Table:    $(RESULTS)/tables/results.csv (and .md, .tex)"
	@echo "Pictures:"
	@ls $(RESULTS)/figures/*.png | sed 's/^/  /'
	@echo "Report:   $(RESULTS)/report.html"
	@echo "Adapter:  $(RESULTS)/adapters/ctrl"
	@echo "Runs:     make ui"

paper: $(VENV)/.installed
	@python scripts/estimate_time.py --cores $(CORES)
	snakemake --cores $(CORES) paper
	snakemake --report $(RESULTS)/report.html paper
	@dvc commit --force --quiet || echo "DVC did not record this run (it needs a git checkout)" >&2
	@cat $(RESULTS)/tables/paper.md
	@echo "Sweep of gamma: $(RESULTS)/figures/gamma_sweep.png"
	@echo "All methods on one page: $(RESULTS)/methods.md"

doctor: $(VENV)/.installed
	@python scripts/doctor.py --config $(RESULTS)/config.json --classifier $(RESULTS)/classifier --cells $(RESULTS)/cells.json \
		--dataset $(RESULTS)/dataset

pull: $(VENV)/.installed
	@python scripts/restore.py

play: PORT = 7860
play: $(PLAY)/.installed
	@$(PLAY)/bin/python -m scripts.play --adapter $(RESULTS)/adapters/ctrl --port $(PORT)

ui: $(VENV)/.installed
	@test -f results/mlflow.db || { echo "error: results/mlflow.db is missing; make demo logs the first runs" >&2; exit 1; }
	@echo "http://$(UI_HOST):$(PORT)/#/experiments?workflowType=machine_learning"
	@MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui \
		--backend-store-uri sqlite:///$(CURDIR)/results/mlflow.db --host $(UI_HOST) --port $(PORT) --workers 1

test: $(VENV)/.installed $(PLAY)/.installed
	python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"
	python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m slow

lint: $(VENV)/.installed
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow

format: $(VENV)/.installed
	ruff check --fix .
	ruff format .
	snakefmt Snakefile workflow
