# make install     set everything up in .venv and do nothing else; then: . .venv/bin/activate
# make figure1     set everything up and make results/figure1.pdf
# make paper       set everything up and make every result of the paper, and results/report.html with all of them
# make report      build the report of the recorded results without training: docs/_build/report.html
# make test        set everything up and run all tests
# make lint        run all linters
# make lock        resolve the dependencies of pyproject.toml and rewrite both locks and environment.yml
# make benchmark   measure how fast this machine trains, compared with transformers (an hour)
# make slurm-test  run the tests that start a real SLURM (as root; apt-get install slurm-wlm munge)
# make faults      run the fault suite three times and write its report, docs/faults.md
# make soak        train 500 cells on that SLURM, with a kill every few seconds; writes docs/soak.md (40 minutes)
# make gpu-jobs    prepare the files to copy to a GPU machine: docs/offsite.md
# make gpu-check   measure and train on that GPU machine, without Snakemake or network
# make docs        build the documentation site in docs/_build/html
# make docs-links  check the site's external links (needs a network)
PYTHON ?= python3
CORES ?= all
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# So that Snakemake's jobs find the same tools as Snakemake itself.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install figure1 paper report test lint lock benchmark slurm-test faults soak gpu-jobs gpu-check docs docs-links

install: $(VENV)/run.stamp

figure1: $(VENV)/run.stamp
	$(BIN)/snakemake results/figure1.pdf --cores $(CORES)
	@echo 'Look at results/figure1.png, or figure1.pdf.'

paper: $(VENV)/run.stamp
	$(BIN)/snakemake results/paper --cores $(CORES)
	$(BIN)/snakemake results/paper --report results/report.html
	@echo 'Open results/report.html.'

report: $(VENV)/run.stamp
	$(BIN)/python docs/report.py docs/_build/report.html

test: $(VENV)/dev.stamp
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

benchmark: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/floor.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/pipeline.py
	$(BIN)/python benchmarks/tokenization.py
	$(BIN)/python benchmarks/checkpoints.py
	$(BIN)/python benchmarks/plot.py

# The report is part of the site; a build without it works too.
SPHINX = $(BIN)/sphinx-build -E -W --keep-going -n -c docs -d docs/_build/doctrees
docs: $(VENV)/dev.stamp report
	$(SPHINX) -b html . docs/_build/html

docs-links: $(VENV)/dev.stamp
	$(SPHINX) -b linkcheck . docs/_build/linkcheck

slurm-test: $(VENV)/dev.stamp
	MUP_MOE_NEEDS_SLURM=1 $(BIN)/pytest tests/slurm

faults: $(VENV)/dev.stamp
	$(BIN)/pytest tests/faults --fault-rounds 3 --fault-report docs/faults.md

soak: $(VENV)/dev.stamp
	$(BIN)/python tests/slurm/soak.py

# Run at home; gpu-check needs the resulting results/gpu and results/data.
GPU_FIGURES := figure1 attribution figure3 figure2b
gpu-jobs: $(VENV)/run.stamp
	$(BIN)/snakemake results/data/python-large/manifest.json --cores $(CORES) --config preset=gpu
	for preset in gpu gpu-visit; do \
	    PYTHONPATH=src $(BIN)/python -m mup_moe export-jobs --preset $$preset --figures $(GPU_FIGURES) \
	        --out results/gpu/$$preset.jsonl || exit 1; \
	done
	$(BIN)/python benchmarks/variants.py gpu > results/gpu/request.json

# PARTS="look train" is the default. Without make, call tests/gpu/check.sh directly.
gpu-check:
	tests/gpu/check.sh

# A stamp newer than its lock means that the lock is installed.
$(VENV)/run.stamp: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --progress-bar off -r requirements.lock
	@touch $@

# --no-deps: the lock is complete, and mup requires a torchvision that it never imports.
$(VENV)/dev.stamp: $(VENV)/run.stamp requirements-dev.lock
	$(PIP) install --quiet --progress-bar off --no-deps -r requirements-dev.lock
	@touch $@

# Resolves pyproject.toml again; the locks change in no other way. TORCH is installed first, so that no other package
# chooses its build.
TORCH := torch==2.13.0
FREEZE = .venv-lock/bin/python -m pip freeze --exclude mup-moe | sed 's/+cpu$$//' | LC_ALL=C sort -f
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet $(TORCH)
	.venv-lock/bin/python -m pip install --quiet '.[pipeline]'
	$(FREEZE) > requirements.lock
	sed -i '/^  - pip:$$/q' environment.yml
	sed 's/^/      - /' requirements.lock >> environment.yml
	.venv-lock/bin/python -m pip install --quiet '.[pipeline,dev]'
	{ $(FREEZE) | grep -vxFf requirements.lock; echo mup==1.0.0; } | LC_ALL=C sort -f > requirements-dev.lock
	rm -rf .venv-lock
