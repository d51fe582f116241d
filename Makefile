# make demo   everything from phantom images to the table, in minutes, without downloads but packages
# make test   the test suite
# Both set up .venv with the versions of requirements/lock.txt, tried on Linux x86-64 with Python 3.11; a fresh machine needs Python 3.11 (with pip) and gcc.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP = $(@D)/bin/python -m pip --quiet
LOCK := requirements/lock.txt

.PHONY: install demo test test-slow fuzz soak lint lock clean

install: .venv/installed

# From requirements to a virtual environment; what is built from source is built with the same versions.
define environment
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
$(PYTHON) -m venv $(@D)
$(PIP) install --constraint $(LOCK) pip setuptools
endef

.venv/installed: pyproject.toml $(LOCK)
	$(environment)
	$(PIP) install --no-compile --build-constraint $(LOCK) --requirement $(LOCK)
	PYTHONWARNINGS=ignore $(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

demo: install
	$(BIN)/python scripts/demo.py --out demo

test: install
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2

test-slow: install
	$(BIN)/python -m pytest -m slow

# make fuzz N=10000 [READERS=runs,recipes] [SEED=1]: damaged inputs for every reader, and a summary
N ?= 1000
SEED ?= 0
fuzz: install
	$(BIN)/python -m tests.fuzz $(N) --readers "$(READERS)" --seed $(SEED)

# make soak N=200 [COMMANDS=swap,run] [SEED=1]: kills, signals, full disks and two writers over every long command
soak: install
	$(BIN)/python -m tests.soak $(if $(filter file,$(origin N)),200,$(N)) --commands "$(COMMANDS)" --seed $(SEED)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Resolves again what pyproject.toml has changed. Newer versions of all: remove the file first.
lock: install
	$(BIN)/uv pip compile --quiet --universal --no-annotate --custom-compile-command "make lock" \
		--extra all --extra dev --output-file $(LOCK) pyproject.toml

clean:
	rm -rf .venv demo
