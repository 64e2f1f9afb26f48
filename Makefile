# Needs make and Python 3.11 or newer; everything else goes into .venv. `make` lists the targets.

PYTHON ?= python3
JOBS ?= auto

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
INSTALL := $(PY) -m pip install --disable-pip-version-check
LOWEST := .venv-lowest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-lowest kernels sanitize aarch64 wheel check bench install constraints clean

help: ## list the targets
	@echo 'make TARGET [PYTHON=python3.12] [JOBS=4], where TARGET is one of'
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do \
		printf '  %-12s %s\n' "$$name" "$$text"; done

demo: $(STAMP) ## convert a trained p4 network into a separable one and retrain it; results in out/demo
	$(PY) -m analysis.decompose checkpoints/p4cnn-rotdigits.pt --rank 2 --data rotdigits --finetune 10 \
		--out out/demo --force

test: $(STAMP) ## run the tests, JOBS at a time
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile

test-lowest: $(LOWEST)/.installed ## run the tests with the lowest versions of everything but torch; needs Python 3.11
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n $(JOBS) --dist loadfile

kernels: $(STAMP) ## run the tests of the layers with each version of the compiled kernels, and without
	for kernel in any avx2 none; do \
		GCONV_REQUIRE_KERNEL= GCONV_KERNEL=$$kernel OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile \
			tests/gconv/kernels tests/gconv/nn tests/gconv/functional || exit 1; \
	done

HARNESS := $(PY) -m tests.gconv.kernels.harness

sanitize: $(STAMP) ## run the compiled kernels on random layers under AddressSanitizer and UndefinedBehaviorSanitizer
	$(HARNESS) --sanitize --flags=-O1

aarch64: $(STAMP) ## run the compiled kernels on an emulated aarch64; needs gcc-aarch64-linux-gnu and qemu-user
	$(HARNESS) --compiler 'aarch64-linux-gnu-gcc -static' --emulator qemu-aarch64

wheel: $(STAMP) ## build dist/gconv_separable-*.whl, one file for a platform and all versions of Python
	GCONV_REQUIRE_KERNEL=1 $(PY) -m pip wheel --disable-pip-version-check -q --no-deps -w dist .

check: $(STAMP) ## lint everything, and check the types of the packages and benchmarks
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: $(STAMP) ## measure speed, and make table and figure; existing records are kept, BENCH=--full takes half an hour
	$(PY) -m benchmarks.speed $(BENCH)
	$(PY) -m benchmarks.speed table
	$(PY) -m benchmarks.speed figure

install: $(STAMP) ## only create .venv with the versions in constraints.txt, as the targets above do too

# A virtual environment that works is kept. A broken one, or one of an older Python, is created anew.
$(STAMP): pyproject.toml constraints.txt Makefile setup.py $(wildcard gconv/kernels/csrc/*)
	@rm -f $@
	@$(PY) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	|| { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	     || { echo "Python 3.11 or newer is needed, and '$(PYTHON)' is not: name one, as in make PYTHON=python3.12" >&2; exit 1; }; \
	     echo "creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	$(INSTALL) -c constraints.txt -e '.[dev,export,notebooks]'
	@touch $@

# Python is the lowest version too: some packages have no wheels of their lowest versions for a newer one.
$(LOWEST)/.installed: pyproject.toml constraints.txt tests/lowest_versions.py setup.py $(wildcard gconv/kernels/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null \
	|| { echo "Python 3.11 is needed, and '$(PYTHON)' is not: name it, as in make test-lowest PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(LOWEST)
	$(PYTHON) -m tests.lowest_versions > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check -c $(LOWEST)/constraints.txt -e '.[dev,export,notebooks]'
	@touch $@

constraints: ## replace the pins in constraints.txt by the newest versions that pyproject.toml allows
	rm -rf build/pins
	$(PYTHON) -m venv build/pins
	build/pins/bin/python -m pip install --disable-pip-version-check -e '.[dev,export,notebooks]'
	build/pins/bin/python -m pip freeze --all --exclude pip --exclude wheel --exclude-editable > build/pins/freeze.txt
	sed -n '/^#/p' constraints.txt > build/pins/constraints.txt
	sed 's/+[a-z0-9.]*$$//' build/pins/freeze.txt >> build/pins/constraints.txt
	mv build/pins/constraints.txt constraints.txt
	rm -rf build/pins

clean: ## remove .venv, .venv-lowest, the caches and out/demo
	rm -rf $(VENV) $(LOWEST) build dist gconv/kernels/_compiled.* out/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -path ./.git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
