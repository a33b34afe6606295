# What each target does: make help
PYTHON ?= python3
VENV ?= .venv
PYTEST = -m pytest -n auto
# The lower end of the range in pyproject.toml; constraints.txt pins the upper end.
OLDEST_TRANSFORMERS = 5.20.0

.PHONY: help demo test test-slow test-oldest lint fresh

help:
	@echo "make demo         convert a pretrained model, read a long text with it, show what it remembers"
	@echo "make test         the default test suite, in a fresh virtual environment"
	@echo "make test-slow    the tests that take minutes or downloads"
	@echo "make test-oldest  the default test suite with the oldest Transformers of the declared range"
	@echo "make lint         style and type checks"
	@echo "Another Python: make demo PYTHON=python3.13"

define create-venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "$(PYTHON) is missing or older than 3.11; name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
@echo "Installing into $(@D), which takes some minutes the first time ..."
@$(PYTHON) -m venv $(1) $(@D)
@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' || \
	{ echo "The installation failed; it needs a package index, by network or cache. The reason is above."; exit 1; }
@touch $@
endef

.venv/.ready: pyproject.toml constraints.txt
	$(call create-venv)

# Made anew by every run of make that needs it.
.venv-test/.ready: fresh
	$(call create-venv,--clear)

demo: $(VENV)/.ready
	@$(VENV)/bin/python -m scripts.demo

test: .venv-test/.ready
	.venv-test/bin/python $(PYTEST)

test-slow: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -m slow

test-oldest: $(VENV)/.ready
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(VENV)/oldest transformers==$(OLDEST_TRANSFORMERS)
	PYTHONPATH=$(abspath $(VENV)/oldest) $(VENV)/bin/python $(PYTEST)

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
