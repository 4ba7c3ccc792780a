# `make demo` and `make test` need Python 3.11 or newer and nothing else: the environment is made on first use.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
FLOOR := .venv-floor

.PHONY: demo test check bench test-floor clean

demo: $(VENV)/.installed
	$(VENV)/bin/spectrim demo

# One process a core, each with one thread; plain `pytest` runs them one after the other.
TESTS := -n auto --dist worksteal

test: $(VENV)/.installed
	$(VENV)/bin/pytest $(TESTS)

check: $(VENV)/.installed
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest $(TESTS)

bench: $(VENV)/.installed
	$(VENV)/bin/python -m benchmarks.run

# The default tests again, with the oldest transformers supported.
test-floor: $(FLOOR)/.installed
	$(FLOOR)/bin/pytest $(TESTS) -m "not slow and not gpu"

# Caches and build output. The environments stay: remove .venv and .venv-floor by hand to make them anew.
clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find src tests tools benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt)

$(FLOOR)/.installed: pyproject.toml constraints-floor.txt
	$(call install,$(FLOOR),constraints-floor.txt)

# install(environment, constraints): torch comes first and alone, so that the index decides on the CPU or CUDA build
# before anything that depends on torch is resolved. The stamp is written last: a broken install is tried again.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "spectrim needs Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into $(1) with the versions of $(2) (takes a minute or two)"
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install -qq --disable-pip-version-check -c $(2) torch
	@$(1)/bin/python -m pip install -qq --disable-pip-version-check -c $(2) -e '.[dev]'
	@touch $@
endef
