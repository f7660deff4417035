# What raypipe's users and its CI run. Needs python3 (3.11 to 3.13), make and git, nothing else.

PYTHON ?= python3
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

# Some environments tell Python to keep no bytecode; then importing TensorFlow takes a minute each time.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check lock clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1 \2/p' Makefile | \
	while read -r target meaning; do printf 'make %-10s %s\n' "$$target" "$$meaning"; done

setup: $(INSTALLED) ## Install raypipe and all it needs into .venv (another Python: PYTHON=python3.12)

demo: setup ## Extract, tune and report on the built-in sample clips
	$(VENV_PYTHON) -m raypipe.extract
	$(VENV_PYTHON) -m raypipe.tune --num-samples 5
	@echo "The report, for a browser: $$(ls -t "$$PWD"/results/*/report.html | head -n 1)"

test: setup ## Run the tests that take seconds
	$(VENV_PYTHON) -m pytest -m "not slow"

test-slow: setup ## Run the tests that take minutes
	$(VENV_PYTHON) -m pytest -m slow

check: setup ## Lint, format and types, changing nothing
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
	$(VENV_PYTHON) -m mypy

# pip reads the limits for raypipe's own build from one or the other variable, by pip's age.
$(INSTALLED): export PIP_CONSTRAINT := constraints.txt
$(INSTALLED): export PIP_BUILD_CONSTRAINT := constraints.txt
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	    echo 'raypipe needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is' \
	         "$$($(PYTHON) --version 2>&1); install one and name it: make $(MAKECMDGOALS) PYTHON=python3.12"; \
	    exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo '$(PYTHON) cannot make a virtual environment;' \
	         'on Debian and Ubuntu: sudo apt-get install python3-venv'; \
	    exit 1; } >&2
	@echo "1/2 making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo '2/2 installing raypipe, TensorFlow, Ray and the rest: about 3 GB, some minutes'
	@$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,test]'
	@touch $@

lock: ## Renew constraints.txt: the newest versions that pyproject.toml allows
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	    echo 'make lock needs the oldest Python that raypipe supports, as newer versions of packages leave' \
	         'it out: make lock PYTHON=python3.11'; \
	    exit 1; } >&2
	@set -e; fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$(PYTHON) -m venv "$$fresh"; \
	"$$fresh"/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
	    setuptools hatchling -e '.[cpu,test]'; \
	{ sed -n '/^#/p' constraints.txt; \
	  "$$fresh"/bin/python -m pip freeze --all --exclude pip --exclude-editable; } > "$$fresh"/new; \
	cp "$$fresh"/new constraints.txt; \
	git --no-pager diff --stat constraints.txt

clean: ## Remove .venv and all caches; results stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
