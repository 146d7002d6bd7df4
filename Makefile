# make demo         install what is needed and run all seven stages on this machine's CPU, with an embedded teacher and a tiny Mistral
# make test         install and run the tests
# make test-faults  the slow tests: what the demo promises, kills, torn files, a misbehaving teacher
# make lint         ruff, check and format
#
# torch is installed first, on its own. Where the package index serves CUDA builds (PyPI on Linux), this keeps the download small:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_SPEC ?= torch==2.13.0
TORCH_INDEX ?=
PORT ?= 8377

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0 $(BIN)/python -m pytest --durations=15

.PHONY: demo install test test-faults lint clean
.DELETE_ON_ERROR:

demo: .venv/.installed
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0 RAY_DEDUP_LOGS=0 $(BIN)/python -m nli.sample.server --port $(PORT) -- \
	$(BIN)/python -m ray_jobs.pipeline --config configs/demo/pipeline.py --base-url http://127.0.0.1:$(PORT)

install: .venv/.installed

test: .venv/.installed-dev
	$(PYTEST) -m "not fault and not slow and not gpu"

# pytest ends with 5 when it finds no test.
test-faults: .venv/.installed-dev
	@$(PYTEST) -m "(fault or slow) and not gpu" || { status=$$?; [ $$status -eq 5 ] && echo "There are no fault tests yet." || exit $$status; }

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed, and this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

# A venv may carry the time of the interpreter that it links to, so only its presence counts here.
.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH_SPEC)"
	$(PIP) install -c constraints.txt -e .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) install -c constraints.txt -e ".[dev]"
	touch $@
