# make venv | make test | make demo: each sets up what is missing, then runs.
# make demo DATA="voc:photos:train voc:photos:test" takes your own photos; see tools/demo.py.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python

.PHONY: venv test lint demo
.DEFAULT_GOAL := test

venv: $(VENV)/.complete

$(VENV)/.complete: tools/setup_venv.sh tools/install_detectron2.py setup.py constraints.txt
	@PYTHON="$(PYTHON)" bash tools/setup_venv.sh "$(VENV)"

# so many tests at a time, of one thread each
WORKERS ?= 2

test: venv
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

demo: venv
	$(PY) tools/demo.py $(if $(and $(DATA),$(filter command,$(firstword $(origin DATA)))),--data $(DATA))
