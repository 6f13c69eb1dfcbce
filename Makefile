# make demo                   set up, index the sample gallery, open the app
# make demo PHOTOS=/folder    the same with your own pictures
# make test                   set up, lint, types, tests

# The newest Python >= 3.11 that is here; PYTHON=... overrides.
PYTHON ?= $(shell for p in python3.14 python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PORT ?= 7860
BIN := .venv/bin
INDEX := $(if $(PHOTOS),.demo/photos,.demo/gallery)

.PHONY: demo test check clean
.DELETE_ON_ERROR:

demo: .venv/.app
	$(BIN)/clipkit index "$(or $(PHOTOS),data_prep/gallery/pictures)" --index $(INDEX)
	$(BIN)/clipkit app --index $(INDEX) --port $(PORT) --open

test: check
	$(BIN)/pytest -n auto --dist loadfile

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/pip:
	@test -n "$(PYTHON)" || { echo "clipkit needs Python 3.11 or newer; install it, or name it: make PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv .venv

# Stamps: installed again only when pyproject.toml changes.
.venv/.app: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --disable-pip-version-check --quiet -e .
	@touch $@

.venv/.dev: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --disable-pip-version-check --quiet -e '.[dev]'
	@touch $@ .venv/.app
