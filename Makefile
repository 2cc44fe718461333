# make run: set up .venv if it is absent, then let the small model answer. `make help` lists the rest.

VENV := .venv
BIN := $(VENV)/bin
PROMPT ?= What is the capital of France?
MODEL ?= models/scout-tiny/scout-tiny.gguf
# the first Python that is new enough
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: run setup test arm lint format bench clean help
.DEFAULT_GOAL := help

run: setup ## Answer PROMPT="..." with the small model; its speed goes to stderr
	@$(BIN)/llamacli run --no-stdin -v -m $(MODEL) --temp 0 -n 200 "$(PROMPT)"

setup: $(VENV)/.warm ## Make .venv with .venv/bin/llamacli, and compile the kernels

# All tests run in as many processes as there are processors, four at most; chosen ones in one process, for -s and --pdb.
test: $(VENV)/.installed-dev ## Run the tests (ARGS="-k name" for some, ARGS="-m slow" for the slow ones)
	$(BIN)/python -m pytest $(or $(ARGS),-n logical --maxprocesses 4 --dist loadfile)

arm: $(VENV)/.installed-dev ## Run the ARM kernels under qemu, against the same references
	@$(BIN)/python tests/arm.py
	$(BIN)/python -m pytest -m arm tests/cpu/test_kernels.py tests/quantizer/test_search.py $(ARGS)

lint: $(VENV)/.installed-dev ## Check style; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev ## Repair style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.plot ## Measure MODEL=file at two depths; ARGS="--compare" for more; draws bench.png
	$(BIN)/llamacli bench -m $(MODEL) -p 512,4096 -d 0,8192 --startup --plot bench.png $(ARGS)

clean: ## Remove .venv and everything that can be made again
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## This list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' Makefile

# Some systems' Python comes without ensurepip; there the system's pip installs into the environment.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: expected Python 3.11 or newer, found $$(python3 -V 2>&1 || echo none); install it" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || $(PYTHON) -m venv --clear --without-pip $(VENV)

define install
	@echo "installing into $(VENV) ..." >&2
	@if $(BIN)/python -m pip --version >/dev/null 2>&1; \
	then $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '$(1)'; \
	else $(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check -e '$(1)'; fi
endef

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(call install,.)
	@touch $@

# again whenever the kernels change
$(VENV)/.warm: $(VENV)/.installed $(shell find llamacli/cpu/kernels quantize/encoders -name "*.py")
	@$(BIN)/llamacli warmup >&2
	@touch $@

# matplotlib is needed for the picture only
$(VENV)/.plot: $(VENV)/.warm
	$(call install,.[plot])
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(call install,.[dev])
	@touch $@ $(VENV)/.installed
