# `make run` for a first run, `make test` for every check, `make help` for the rest.
# PYTHON: the Python (>= 3.11) that creates the environment, by default the first one found that
# is new enough. VENV: the environment's folder.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$python; break; }; done)
VENV ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin
# One torch thread per test worker: more would only take each other's cores. tests/lint holds the
# rules for prose, chapters and project files, which `make lint` checks.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
TESTS := $(PYTEST) -n $(WORKERS) --ignore tests/lint

.DEFAULT_GOAL := help
.PHONY: help run test check venv lint format types unit coverage notebooks mutations psets book \
	book-check book-pdf binder wheel serve records results lock audit torture clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

run: venv ## install what is missing, then train the bundled model and show the result
	$(BIN)/cpugrpo run

test: lint types coverage notebooks mutations book book-check ## every check: style, types, tests, notebooks, broken packages, book, its pages

check: lint types unit ## what to run while you work: style, types and the fast tests

venv: ## create the environment from requirements.lock (at once when it is up to date)
	@python='$(PYTHON)'; if [ -z "$$python" ]; then \
		echo "No Python 3.11 or newer found (TRL 1.16 needs it); install one, or name it:" \
		"make run PYTHON=/path/to/python3" >&2; exit 1; fi; \
	"$$python" tools/install.py --venv "$(VENV)"

lint: venv ## style, formatting, layers of imports; rules for prose, chapters and project files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ruff check --config line-length=76 notebooks/*.ipynb
	$(BIN)/ruff format --check --config line-length=76 notebooks/*.ipynb
	$(BIN)/ruff check notebooks/instructor/*.ipynb
	$(BIN)/ruff format --check notebooks/instructor/*.ipynb
	$(BIN)/lint-imports --no-cache
	$(PYTEST) -q tests/lint

format: venv ## ruff: fix style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: venv ## mypy on the package
	$(BIN)/mypy

unit: venv ## the fast tests
	$(TESTS) -m 'not slow'

# run by hand: hostile submissions (make psets runs them), JupyterLab in a browser
BY_HAND := --ignore tests/test_hostile.py --ignore tests/test_lab.py --ignore tests/test_lab_grading.py
coverage: venv ## all tests, the slow ones too (kills and resumes, whole books), with coverage
	$(TESTS) $(BY_HAND) --cov --cov-report=term

notebooks: venv ## execute every notebook with nbval
	$(BIN)/python tools/notebooks.py --jobs $(WORKERS) $(ARGS)

mutations: venv ## break the package on purpose: a notebook must fail each time
	$(BIN)/python tools/mutations.py

psets: venv ## problem sets: student versions, zoo of answers, leaks, honest and hostile submissions
	$(BIN)/python tools/psets.py $(ARGS)

# Without a network where the system allows that, so that every build proves that it needs none
ALONE = $(shell unshare -rn true 2>/dev/null && echo unshare -rn)
book: venv ## build the book from the stored outputs into _build/html
	$(ALONE) $(BIN)/jupyter-book build -W -n --keep-going .

book-check: book ## read every page of the book in Chromium, as a reader would
	$(BIN)/python tools/book_check.py $(ARGS)

book-pdf: book ## print the book into _build/cpugrpo_edu.pdf (needs Chromium)
	$(BIN)/python tools/book_pdf.py

binder: venv ## build the pip part of environment.yml from scratch, as Binder would (needs the network)
	$(BIN)/python tools/binder.py

wheel: venv ## build the wheel and try it in fresh environments of Python 3.11, 3.12 and 3.13
	$(BIN)/python tools/try_wheel.py $(ARGS)

serve: book ## show the book at http://127.0.0.1:8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html 8000

records: venv ## repeat the recorded training runs (about a quarter of an hour) and keep their records
	$(BIN)/python tools/records.py $(ARGS)

results: venv ## write the readme's results from records/run-*.json
	$(BIN)/python tools/results.py

lock: venv ## solve pyproject.toml again into requirements.lock (ARGS=--upgrade renews all pins)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python tools/lock.py $(ARGS)

audit: venv ## ask a vulnerability service about the pinned packages (needs the network)
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip_audit --no-deps --disable-pip -r requirements.lock

torture: venv ## kill and resume runs, measure memory budgets, refuse bad input (ARGS="--points 50 --default" for all)
	$(BIN)/python tools/torture.py $(ARGS)

clean: ## delete what the targets built, and the environment
	rm -rf $(VENV) _build build dist .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
