# make demo                   set up, index the sample gallery, open the app
# make demo PHOTOS=/folder    the same with your own pictures
# make test                   set up, lint, types, import contracts, tests
# make quick                  the same with the tests that take a second or less: under a minute
#
# On Linux, PyPI's torch brings several gigabytes of CUDA. Each target takes:
#   TORCH=cpu                 torch from download.pytorch.org/whl/cpu; or cu126, ..., or the address of an index
#   SYSTEM=1                  the torch, and whatever else, that $(PYTHON) has; it is used if it is new enough
#   VENV=/folder              install into this virtual or conda environment, which may have its torch already
#
# make builtin DATA=DIR       make the built-in model anew in BUILD=build/builtin, or go on where that was stopped
#                             (see clipkit/builtin/MODEL_CARD.md)

# The newest Python >= 3.11 that is here; PYTHON=... overrides.
PYTHON ?= $(shell for p in python3.14 python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PORT ?= 7860
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check --quiet
INDEX := $(if $(PHOTOS),.demo/photos,.demo/gallery)
WORDNET := /usr/share/wordnet

.PHONY: demo test quick check builtin-sources builtin clean
.DELETE_ON_ERROR:

demo: $(VENV)/.clipkit-app
	$(BIN)/clipkit index "$(or $(PHOTOS),data_prep/gallery/pictures)" --index $(INDEX)
	$(BIN)/clipkit app --index $(INDEX) --port $(PORT) --open

test: check
	$(BIN)/pytest -n auto --dist loadfile

quick: check
	$(BIN)/pytest -n auto --dist loadfile -m 'not (slow or browser or parity or end_to_end)'

check: $(VENV)/.clipkit-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# What the recipe needs is asked for before anything is installed.
builtin-sources:
	@test -d "$(DATA)" || { echo "make builtin needs DATA=DIR, the folder that clipkit/builtin/MODEL_CARD.md describes"; exit 2; }
	@test -f "$(WORDNET)/data.noun" || { echo "make builtin needs WordNet 3.0, and $(WORDNET) has no data.noun: \
	install it (Debian's wordnet-base), or name its folder: WORDNET=DIR"; exit 2; }

builtin: builtin-sources $(VENV)/.clipkit-app
	$(PIP) -e '.[builtin-recipe]'
	$(MAKE) -f data_prep/builtin_model/build.mk BIN=$(BIN) WORDNET="$(WORDNET)"

clean:
	rm -rf .venv .demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "clipkit needs Python 3.11 or newer; install it, or name it: make PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(if $(SYSTEM),--system-site-packages) $(VENV)

# Stamps: installed again only when pyproject.toml changes.
$(VENV)/.clipkit-app: pyproject.toml | $(BIN)/pip
	$(TORCH_FIRST)
	$(KEEP_TORCH)
	$(PIP) -c $(VENV)/.torch -e .
	@touch $@

$(VENV)/.clipkit-dev: pyproject.toml | $(BIN)/pip
	$(TORCH_FIRST)
	$(KEEP_TORCH)
	$(PIP) -c $(VENV)/.torch -e '.[dev]'
	@touch $@ $(VENV)/.clipkit-app

# torch and torchvision, as pyproject.toml wants them, from the index that TORCH names: what follows
# finds them there and takes no others.
define TORCH_FIRST
$(if $(TORCH),$(PIP) --index-url $(if $(findstring /,$(TORCH)),$(TORCH),https://download.pytorch.org/whl/$(TORCH)) \
	$$(sed -n 's/^ *"\(torch[a-z]*[>=0-9.]*\)".*/\1/p' pyproject.toml),@:)
endef

# A torch that the named environment has stays: without torchvision beside it, pip would replace it.
define KEEP_TORCH
@$(if $(SYSTEM)$(filter-out .venv,$(VENV)),$(BIN)/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' 2>/dev/null,:) \
	> $(VENV)/.torch || true
endef
