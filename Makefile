# `make demo` and `make test` do everything, set-up included, on a machine with make and Python 3.11 or newer.
PYTHON ?= python3
# Installed before transformers, so that pip does not choose another build. Another one: make test TORCH="torch==X.Y.Z".
TORCH ?= torch==2.13.0
# Processes that run tests side by side; each takes a run of them, so that most fixtures are made once, and the idle one takes from the other.
WORKERS ?= 2
# For example: make test PYTEST_ARGS="-x -k parity".
PYTEST_ARGS ?=
PARALLEL := -n $(WORKERS) --dist worksteal

WHEEL_TEST := build/wheel-test
BUNDLES := $(CURDIR)/$(WHEEL_TEST)/bundles

# $(call venv,DIR): make the virtual environment DIR unless it is there.
define venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pgx needs Python 3.11 or newer, not %d.%d; make PYTHON=python3.12" % sys.version_info[:2])'
@test -x $(1)/bin/pip || $(PYTHON) -m venv $(1)
endef

.PHONY: help demo test test-source test-wheel report-example lint format clean distclean

help:
	@echo "make demo     export, run and draw with the embedded model; writes demo/ (no torch)"
	@echo "make test     the whole test suite, then the built wheel without any export tool"
	@echo "make report-example   measure the embedded model in every recipe again and write docs/report-tiny"
	@echo "make lint     ruff and mypy"
	@echo "make format   let ruff fix and format"
	@echo "make clean    delete what the above wrote; make distclean: the environments too"

demo: .venv-demo/.stamp
	rm -rf demo
	.venv-demo/bin/pgx demo -o demo/

test: test-source test-wheel

test-source: .venv/.stamp
	.venv/bin/pytest $(PARALLEL) $(PYTEST_ARGS)

# The wheel has to work with the base and one engine only. A copy of tests/ runs away from the source tree, on bundles that
# the full environment exports. Then the full environment, where torch and onnx could be imported, shows that they are not.
test-wheel: .venv/.stamp .venv-wheel/.stamp
	rm -rf $(WHEEL_TEST)
	.venv/bin/python -m build --outdir $(WHEEL_TEST)/dist .
	.venv-wheel/bin/pip install --quiet --no-deps --force-reinstall $(WHEEL_TEST)/dist/*.whl
	.venv/bin/pgx export --size tiny --res 112 -o $(BUNDLES)/tiny-112
	.venv-wheel/bin/python -c 'import importlib.util as u, sys; \
	  found = [m for m in ("torch", "transformers", "onnx", "onnx_ir") if u.find_spec(m)]; \
	  sys.exit(f"{found} in .venv-wheel, which must hold the base and [cpu] only; make distclean" if found else 0)'
	set -e; away=$$(mktemp -d); trap 'rm -rf "$$away"' EXIT; cp -R tests pyproject.toml "$$away"; cd "$$away"; \
	  PGX_TEST_BUNDLES=$(BUNDLES) $(CURDIR)/.venv-wheel/bin/pytest $(PARALLEL) ./tests --pyargs pgxport
	PGX_TEST_BUNDLES=$(BUNDLES) .venv/bin/pytest tests/test_imports.py

# For example: make report-example EXAMPLE_ARGS="--limit 2 -o /tmp/example". Screenshots are made where Chromium is installed.
report-example: .venv/.stamp
	.venv/bin/python tools/report_example.py $(EXAMPLE_ARGS)

lint: .venv/.stamp
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

format: .venv/.stamp
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

clean:
	rm -rf build dist demo .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find pgxport tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-demo .venv-wheel

.venv/.stamp: pyproject.toml
	$(call venv,.venv)
	.venv/bin/pip install "$(TORCH)"
	.venv/bin/pip install -e ".[export,cpu,reference,dev]"
	@touch $@

.venv-demo/.stamp: pyproject.toml
	$(call venv,.venv-demo)
	.venv-demo/bin/pip install -e ".[export,cpu]"
	@touch $@

# Holds what the wheel depends on, and not the wheel: test-wheel puts in the one it has just built.
.venv-wheel/.stamp: pyproject.toml
	rm -rf .venv-wheel
	$(call venv,.venv-wheel)
	.venv-wheel/bin/pip install ".[cpu]" "pytest>=8.3" "pytest-xdist>=3.6"
	@touch $@
