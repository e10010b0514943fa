# make demo, make test and make bench need no other command before them.
PY := .venv/bin/python
# Several engines share the cores: threads of one would take them from the others.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: env model demo test lint bench soak

env: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt scripts/make_env.sh
	@PYTHON="$(PYTHON)" scripts/make_env.sh

model: env
	@$(PY) demo/fetch_model.py

# ONCE=1: ask each model one question, show who held what, and stop.
demo: model
	@$(PY) demo/run.py $(if $(ONCE),--once)

test: model
	$(PY) -m pytest

# Random clients and operators while processes are killed; it runs against time, so it is no test.
# ARGS="--minutes 20 --seed 2"
soak: model
	$(PY) -m tests.soak --faults $(ARGS)

lint: env
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy prism_sgl

bench: model
	@for file in benchmarks/[!_]*.py; do name=benchmarks.$$(basename $$file .py); echo "== $$name"; $(PY) -m $$name || exit 1; done
