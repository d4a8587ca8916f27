.PHONY: help demo test lint
.DEFAULT_GOAL := help

PYTHON ?= python3
READY := .venv/installed

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 8

demo: $(READY)  ## pre-train a small model on the bundled images, on the CPU, and show the result
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash demo/run.sh

test: $(READY) lint  ## lint, then run the tests
	.venv/bin/python -m pytest

lint: $(READY)  ## check style and formatting
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Made anew when the requirements change; python -m venv --clear also mends a half-made one.
$(READY): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) is older than Python 3.10: set PYTHON=..."; exit 2; }
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
