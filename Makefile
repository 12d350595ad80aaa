# `make run` and `make test` are all that a fresh machine needs: Python 3.11 or newer, make, git.

BIN := .venv/bin
READY := .venv/ready
PAPER ?= token_shuffle
# Every test but those of the repository and of executed notebooks, which need the pinned versions.
UNIT_TESTS = $(filter-out tests/device,$(wildcard tests/*/))
FIND_PYTHON = for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	    >/dev/null 2>&1 && break; python=; done; \
	if [ -z "$$python" ]; then \
	  echo "No Python 3.11 or newer with venv was found (python3 is $$(python3 -V 2>&1)): \
	install one, or name it with make PYTHON=..."; exit 1; fi

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help run test reference gpu lab docs readme check constraints dist floors newest clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(READY) ## execute one notebook, print its claims, write HTML (PAPER=token_shuffle)
	@$(BIN)/shuffle-nb run $(PAPER) --html

test: $(READY) ## all tests, two at a time
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

reference: $(READY) ## record how near we come to the authors' own numbers, case by case
	@rm -f shuffle_nb/reference_agreement.json; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p tests.reference_record

gpu: $(READY) ## run every core on the accelerator, if there is one (CORES="snnk bows")
	@$(BIN)/python tests/device/device_check.py $(CORES)

lab: $(READY) ## open JupyterLab on your own copy of the notebooks
	@$(BIN)/shuffle-nb lab

docs: $(READY) ## render the site into _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "make docs needs Quarto:" \
	  "install it from https://quarto.org/docs/get-started/ and call make docs again"; exit 1; }
	rm -rf _proc
	PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_docs

readme: $(READY) ## make README.md from nbs/index.ipynb
	@$(BIN)/python tests/readme.py

check: $(READY) ## ruff, and whether modules, notebooks and README are in sync
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && \
	$(BIN)/python -m pytest -q tests/test_repository.py -k "clean or sync"

constraints: ## pin the newest versions, torch as it is (PYTHON=the oldest supported)
	@set -e; $(FIND_PYTHON); folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	"$$python" -m venv "$$folder/venv"; pip="$$folder/venv/bin/python -m pip"; \
	grep '^torch==' constraints.txt > "$$folder/held"; \
	echo "Installing the newest versions with $$("$$python" -V) ..."; \
	$$pip install -qq -c "$$folder/held" -e ".[dev]"; $$pip check; \
	{ grep '^#' constraints.txt; $$pip freeze --all --exclude-editable --exclude pip \
	  | sed 's/+[^ ]*$$//' | LC_ALL=C sort -f; } > "$$folder/new"; \
	mv "$$folder/new" constraints.txt

dist: $(READY) ## build sdist and wheel into dist/, and try each in a new environment
	@rm -rf dist build && $(BIN)/python -m build -o dist && \
	DIST_FOLDER=dist $(BIN)/python -m pytest -q tests/test_distribution.py

floors: ## unit tests with the oldest versions that settings.ini promises (in .venv-floors)
	@set -e; $(FIND_PYTHON); [ -x .venv-floors/bin/python ] || "$$python" -m venv .venv-floors; \
	.venv-floors/bin/python -m pip install -qq uv; \
	.venv-floors/bin/uv pip install -q --python .venv-floors/bin/python \
	  --resolution lowest-direct -e ".[dev]"; \
	OMP_NUM_THREADS=1 .venv-floors/bin/python -m pytest -n 2 --dist loadgroup $(UNIT_TESTS)

newest: ## all tests with the newest versions, none pinned (in .venv-newest)
	@set -e; $(FIND_PYTHON); [ -x .venv-newest/bin/python ] || "$$python" -m venv .venv-newest; \
	.venv-newest/bin/python -m pip install -qq --upgrade -e ".[dev]"; \
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 --dist loadgroup

clean: ## delete what builds leave behind (keeps .venv, runs and lab)
	rm -rf _proc _docs build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@set -e; if [ ! -x $(BIN)/python ]; then $(FIND_PYTHON); "$$python" -m venv .venv; fi; \
	echo "Installing shuffle_nb and what it needs into .venv (minutes the first time) ..."; \
	$(BIN)/python -m pip install -qq -c constraints.txt -e ".[dev]"; touch $@
