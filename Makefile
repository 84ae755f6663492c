# make reproduce · make test · make docs: each installs what it needs into .venv first.
PRESET ?= tiny
WORLD ?= quick
SEEDS ?= 1
# 1: also the wider comparisons that go beyond the papers
SWEEPS ?= 0
CORES ?= 2
# more arguments for pytest, snakemake or pip: make test ARGS="-k aft"
ARGS ?=
PIP_ARGS ?=

NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p $(NEW_ENOUGH) 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin

.PHONY: help install lint reproduce record test test-all readme docs bench

help:
	@echo "make reproduce   run the study (PRESET=$(PRESET) WORLD=$(WORLD) SEEDS=$(SEEDS) SWEEPS=$(SWEEPS) CORES=$(CORES)); finished runs are kept"
	@echo "make record      three seeds of the study, then the recorded results, figures and outputs anew"
	@echo "make lint        check the style of notebooks, tests and tools with ruff"
	@echo "make test        run the tests: notebooks, golden vectors, faults, photographs, structure, site"
	@echo "make test-all    the same, and the recorded study once more"
	@echo "make docs        build the site into _docs (needs Quarto)"
	@echo "make bench       time the library against plain code and published packages"
	@echo "make readme      write README.md from nbs/index.ipynb"

install: $(BIN)/installed

$(BIN)/installed: settings.ini setup.py
	@$(or $(PYTHON),false) $(NEW_ENOUGH) 2>/dev/null || { echo "Python 3.11 or newer is needed, found $(or \
	$(PYTHON),none). Name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[dev]'
	@touch $@

reproduce: install
	$(BIN)/snakemake --cores $(CORES) --rerun-incomplete --show-failed-logs --quiet host reason \
		--config preset=$(PRESET) world=$(WORLD) seeds=$(SEEDS) sweeps=$(SWEEPS) $(ARGS)

# the recorded study is the embedded world at its usual size. Its outputs change the notebooks, not their code: finished runs
# stay valid, and --touch says so to Snakemake
record: SEEDS = 3
record: SWEEPS = 1
record: reproduce
	$(BIN)/python tools/record.py $(SEEDS)
	$(BIN)/nbdev_clean
	$(BIN)/python tools/readme.py
	$(BIN)/snakemake --cores 1 --touch --quiet host reason --config seeds=$(SEEDS) sweeps=$(SWEEPS)

# the package is generated, so its notebooks are checked in its place
lint: install
	$(BIN)/ruff check .

test: install
	$(BIN)/python -m pytest -m "not slow" -n $(CORES) --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: install
	$(BIN)/python -m pytest -n $(CORES) --dist loadfile --no-loadscope-reorder $(ARGS)

readme: install
	$(BIN)/python tools/readme.py

# pages show what the runs of one study left; without them they say how to make it
docs: readme
	@command -v quarto >/dev/null || { echo "make docs needs Quarto (quarto.org) on the PATH;" \
		"make test checks the pages without it" >&2; exit 1; }
	$(BIN)/nbdev_proc_nbs
	$(BIN)/python tools/pages.py $(PRESET)/$(WORLD)-seed0
	cd _proc && quarto render --no-cache
	rm -rf _docs && mv _proc/_docs _docs

bench: install
	$(BIN)/python tests/bench/all.py $(ARGS)
