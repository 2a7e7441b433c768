# make demo   sets everything up in .venv and draws a first picture through the real graph
# make serve  serves configs/demo.yaml on http://127.0.0.1:8000 until Ctrl-C
# make test   sets everything up and runs all tests;  make lint: ruff and mypy
# make chaos  kills, stops and blocks replicas under traffic and prints how long each fault took to get over
# make bench  compares the service with its rivals and writes docs/benchmark; needs two idle cores for half an hour
#
# Needs Python 3.11 or newer, make and git. On Linux, PyPI's torch brings CUDA (several GB); for a CPU
# build: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
PORT ?= 8000
# Through the environment, so that a quote or a dollar in a prompt is not the shell's.
export PROMPT ?= a red circle above a blue square on a white background
export OUTPUT ?= out.png
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo serve test lint chaos bench chromium clean
.DEFAULT_GOAL := demo

# One thread a process: a dozen processes share the cores.
export OMP_NUM_THREADS ?= 1

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/sdxl-serve generate "$$PROMPT" --num-inference-steps 25 -o "$$OUTPUT"

serve: $(VENV)/.installed
	$(BIN)/sdxl-serve serve --port $(PORT)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The page is tested in a real Chromium. Debian's is installed where that may be done; else the tests say what is missing.
chromium:
	@for name in "$$CHROMIUM" chromium chromium-browser google-chrome; do \
	    test -n "$$name" && command -v "$$name" >/dev/null && exit 0; \
	done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; \
	else \
	    echo 'no Chromium, and none can be installed here: the tests of the page will fail' >&2; \
	fi

# loadgroup hands out one test at a time, in their order.
test: $(VENV)/.installed-test chromium
	$(BIN)/python -m pytest -n 2 --dist loadgroup

chaos: $(VENV)/.installed-test
	$(BIN)/python -m tests.chaos

bench: $(VENV)/.installed-bench
	$(BIN)/python -m comparison.compare

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
