# Two commands on a fresh machine with python3 >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEMO   := digits/natural digits/at digits/ls095_sigma03 digits/lsq2_sigma03
SAMPLES ?=

.PHONY: demo test lint types unit clean

# The main job on the embedded data set: four models, the white-box suite, every test image.
demo: $(READY)
	rm -rf build/demo
	$(BIN)/robbench eval $(addprefix --model ,$(DEMO)) --suite whitebox --results build/demo $(if $(SAMPLES),--samples $(SAMPLES))

test: lint types unit
	$(BIN)/robbench cards --check
	$(BIN)/robbench leaderboard --check
	$(BIN)/robbench trained --check
	$(BIN)/robbench table all --check
	$(BIN)/robbench figure all --check

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/pytest -n auto --dist worksteal

# torch and torchvision come from one resolve, so that their builds fit each other.
$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "robbench needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[all,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist runs
