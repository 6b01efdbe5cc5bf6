# Two commands do everything: `make demo` and `make test`. Both set up an environment in .venv first.
#
#   make demo     the main job on the embedded model and a drawn pool: a table, and the path of a report
#   make test     all tests
#   make torture  faults injected into whole runs until 600 are done (half an hour of one core; Linux, a C compiler)
#   make check    lint, format and types
#   make fuzz     coverage-guided fuzzing of readers, pictures, recipes and judges' replies, ten minutes each (SECONDS=60: one)
#   make audit    known holes in the pinned versions (needs a network)
#   make bench    every figure of docs/performance.md (some three hours of one core); the peers are measured where
#                 MERGEKIT=path/to/mergekit-yaml and PEERS=bin-folder-with-bergson-and-kronfluence are given
#   make evidence-quick  a part of docs/evidence.md trained again: does it still point where the results do? (five minutes)
#   make evidence  the tables of docs/evidence.md again, from the committed results
#   make docs     the documentation as a site in build/site; opens offline
#   make reference  docs/recipe.md and docs/cli.md again, from the code
#   make packs    the example recipe on real data: make packs DATA=folder with the unpacked packs
#   make tiny     train the embedded model again, from scratch (over an hour of one core)
#
# VENV=DIR uses or makes another environment. TORCH='torch==2.13.0 --index-url URL' says which torch to install;
# a torch that is importable already, in VENV or for PYTHON, is never replaced.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: fuzz audit setup demo test torture check bench evidence evidence-quick packs tiny wheel docs reference clean

setup: $(VENV)/.datalloy-installed

$(VENV)/.datalloy-installed: pyproject.toml constraints.txt scripts/setup.sh
	VENV="$(VENV)" PYTHON="$(PYTHON)" TORCH="$(TORCH)" sh scripts/setup.sh
	@touch $@

demo: setup
	$(BIN)/datalloy demo

# a process a core, each with one thread; the tests of one file stay together and share what is dear to make
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

torture: setup
	OMP_NUM_THREADS=1 PYTHONPATH=tests nice -n 10 $(BIN)/python -m torture

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/padding.py
	$(BIN)/python benchmarks/compiled.py
	$(BIN)/python benchmarks/kept_vision.py
	$(BIN)/python benchmarks/trained.py --worlds noisy
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/viewer.py
	$(BIN)/python experiments/candidate_cost.py --out experiments/results/candidate_cost.json
	$(BIN)/python benchmarks/merging.py $(if $(MERGEKIT),--mergekit $(MERGEKIT)) --out benchmarks/results/merging.json
	$(BIN)/python benchmarks/merging.py --dtypes float32 --turns 3 --width 2048 --layers 9 --out benchmarks/results/merging_large.json
	$(if $(PEERS),$(PEERS),$(BIN))/python benchmarks/peers.py --out benchmarks/results/peers.json

evidence: setup
	$(BIN)/python scripts/evidence.py

evidence-quick: setup
	OMP_NUM_THREADS=1 $(BIN)/python experiments/quick.py

packs: setup
	@test -n "$(DATA)" || { echo "usage: make packs DATA=folder-with-the-unpacked-packs"; exit 2; }
	$(BIN)/python scripts/run_packs.py --data "$(DATA)"

SECONDS ?= 600
FUZZ_TARGETS ?= reader image recipe verdict

fuzz: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'atheris>=2.3'
	for target in $(FUZZ_TARGETS); do $(BIN)/python scripts/fuzz.py $$target --seconds $(SECONDS) || exit 1; done

audit: setup
	$(BIN)/python -m pip install --quiet 'pip-audit>=2.7'
	$(BIN)/python -m pip_audit --disable-pip --require-hashes --requirement requirements.lock

tiny: setup
	$(BIN)/python scripts/pretrain_tiny.py --out src/datalloy/tiny/weights

docs: setup
	$(BIN)/python -m mkdocs build --quiet
	@echo 'build/site/index.html; searching works where it is served: python -m http.server -d build/site'

reference: setup
	$(BIN)/python scripts/build_reference.py

wheel: setup
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist datalloy-demo src/datalloy.egg-info
