.PHONY: help demo test test-faults test-slurm lint bench gpu results-small
.DEFAULT_GOAL := help

PYTHON ?= python3
READY := .venv/installed

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 8

demo: $(READY)  ## pre-train a small model on the bundled images, on the CPU, and show the result
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash demo/run.sh

test: $(READY) lint  ## lint, then run the tests
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal

test-faults: $(READY)  ## inject all faults of tests/faults and run what else takes long, in less than 15 minutes
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal -m "" tests/faults
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m thorough tests --ignore tests/faults

test-slurm: $(READY)  ## install Slurm, as root, and run its tests
	which slurmctld munged >/dev/null || apt-get install -y --no-install-recommends slurm-wlm munge
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "" tests/faults/test_slurm.py

lint: $(READY)  ## check style, formatting and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

SMALL := --batch_size 128 --pairs 7 --turn 2 --sides ours:auto \
	ours:auto:compile ours:off transformers:off transformers:bf16

# One after the other: two at once would slow each other.
bench: $(READY)  ## measure speed, count memory, and write their pages
	.venv/bin/python -m benchmarks.train_step
	.venv/bin/python -m benchmarks.train_step --model mae_vit_tiny_patch4 --input_size 32 $(SMALL)
	.venv/bin/python -m benchmarks.train_step --model mae_vit_nano_patch4 --input_size 28 $(SMALL)
	.venv/bin/python -m benchmarks.train_step --task finetune --model vit_base_patch16 --batch_size 16
	.venv/bin/python -m benchmarks.data_loading
	.venv/bin/python -m benchmarks.whole_run
	.venv/bin/python -m benchmarks.memory
	.venv/bin/python -m benchmarks.scaling
	.venv/bin/python -m benchmarks.load
	.venv/bin/python -m benchmarks.table

results-small: $(READY)  ## run docs/results.md's table of Fashion-MNIST anew (1.5 to 5 core-hours), and compare
	.venv/bin/python recipes/fashion_mnist.py --into recipes/output/anew
	.venv/bin/python recipes/compare.py recipes/output/anew

gpu: $(READY)  ## test and measure on a GPU, for at most 12 minutes
	.venv/bin/python -m benchmarks.gpu

# Made anew when the requirements change; python -m venv --clear also mends a half-made one.
$(READY): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) is older than Python 3.10: set PYTHON=..."; exit 2; }
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
