# make test, make demo: each makes a virtual environment in $(VENV), installs the package there, and runs.
#
#   VENV=.venv            where the environment goes; both targets share it
#   PYTHON=python3        Python 3.10 to 3.13 that makes it
#   TORCH=torch==2.13.0   what to ask pip for if the environment has no torch yet; 2.11 or later
#   TESTS, PYTEST, DEMO   what pytest runs, arguments for pytest, arguments for `lutgemm demo`

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
TESTS ?= $(CURDIR)/tests
PYTEST ?=
DEMO ?=

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml MANIFEST.in \
  $(shell find lutgemm bench kernels csrc build_tools -name '*.py' -o -name '*.md' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: test demo lint build clean
.DELETE_ON_ERROR:

# The pytest command does not put the checkout on the import path, and the working folder is another one: the tests
# see the installed wheel.
test: $(VENV)/.installed-dev
	folder=$$(mktemp -d) && cd "$$folder" && status=0 && \
	{ "$(BIN)/pytest" -c "$(CURDIR)/pyproject.toml" --rootdir "$(CURDIR)" $(PYTEST) $(TESTS) || status=$$?; } && \
	rm -rf "$$folder" && exit $$status

demo: $(VENV)/.installed-demo
	"$(BIN)/lutgemm" demo $(DEMO)

lint: $(VENV)/.installed-dev
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs -r "$(BIN)/clang-format" --dry-run -Werror

# In place, for the Python that has lutgemm installed by `pip install -e . --no-build-isolation`; a failing compile fails.
# LUTGEMM_BUILD=cuda: with the GPU kernels, whatever torch is.
build:
	LUTGEMM_BUILD=$${LUTGEMM_BUILD:-cpu} $(PYTHON) setup.py build_ext --inplace

clean:
	rm -rf build dist lutgemm.egg-info lutgemm/_C*.so lutgemm/_host*.so lutgemm/_build_info.json

# The dev extra holds the test extra and the linters.
$(VENV)/.installed-%: $(SOURCES) | $(VENV)/.torch
	$(PIP) install "$(CURDIR)[$*]"
	touch $@

# torch goes first: the build compiles against the torch that it finds in the environment.
$(VENV)/.torch:
	test -x "$(BIN)/python" || $(PYTHON) -m venv "$(VENV)"
	"$(BIN)/python" -c "import torch" 2>/dev/null || $(PIP) install "$(TORCH)"
	touch $@
