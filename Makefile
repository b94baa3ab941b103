# Two commands on a fresh machine with python3 >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
BASE   := $(VENV)/.base
READY  := $(VENV)/.ready
DEMO   := digits/natural digits/at digits/ls095_sigma03 digits/lsq2_sigma03
SAMPLES ?=
DIGITS := natural at trades ls095_sigma03 lsq2_sigma03
MNIST  := natural at ls095_sigma03

# Where Python may not keep compiled modules, each command takes seconds longer to start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test quick gate baselines lint types unit clean

# The main job on the embedded data set: four models, the white-box suite, every test image.
demo: $(BASE)
	rm -rf build/demo
	$(BIN)/robbench eval $(addprefix --model ,$(DEMO)) --suite whitebox --results build/demo $(if $(SAMPLES),--samples $(SAMPLES))

test: lint types unit gate
	$(BIN)/robbench cards --check
	$(BIN)/robbench leaderboard --check
	$(BIN)/robbench trained --check
	$(BIN)/robbench table all --check
	$(BIN)/robbench table audit --check
	$(BIN)/robbench figure all --check

# The tests that start no process, train nothing, run no whole suite and need no download. `make test` runs all.
quick: $(READY)
	$(BIN)/pytest -n auto --dist worksteal -m "not whole and not gpu and not slow"

# The models of this repository against their baselines; MNIST where the data are. `make baselines` writes new ones.
gate: $(READY)
	$(BIN)/robbench check --baseline baselines/digits.json
	@if [ -d "$$ROBBENCH_DATA/mnist" ]; then echo $(BIN)/robbench check --baseline baselines/mnist.json; \
	  $(BIN)/robbench check --baseline baselines/mnist.json; \
	else echo "No MNIST in ROBBENCH_DATA: its models are not checked."; fi

baselines: $(READY)
	$(BIN)/robbench baseline $(addprefix --model digits/,$(DIGITS)) --suite quick --out baselines/digits.json
	$(BIN)/robbench baseline $(addprefix --model mnist/,$(MNIST)) --suite quick --samples 100 --out baselines/mnist.json

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/pytest -n auto --dist worksteal --durations 15

# torch and torchvision come from one resolve, so that their builds fit each other.
# pip compiles nothing: Python compiles each module once, when a command first imports it.
$(BASE): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "robbench needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable .
	touch $@

$(READY): $(BASE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[all,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist runs
