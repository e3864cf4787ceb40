# make demo         makes .venv, data, a small model and pictures
# make test         makes .venv, checks style, types and layers, runs the tests, and says what no test ran
# make faults       kills, damage, full disks, signals, a long run, malformed inputs: all of them (docs/reliability.md)
# make test-quick   the same without whole runs, the rehearsal, benchmarks and that (tests/README.md)
PYTHON ?= python3
BIN := .venv/bin
DEMO_CHIPS ?= 48
QUICK := $(addprefix tests/,base run data model training inference kernels test_layering.py test_docs.py test_security.py test_outside.py)

.PHONY: install demo test test-quick faults lint gpu-check clean

install: .venv/.installed

.venv/.installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --progress-bar off -q -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/python launch/prepare.py sample --out data/demo --chips $(DEMO_CHIPS) --seed 1
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/deepspeed launch/train.py --config configs/demo.yaml
	rm -rf demo
	$(BIN)/python launch/predict.py --weights runs/demo --data data/demo --split validation --out demo
	@echo "pictures: demo/scatter.png and demo/pictures/*.png; curves: $(BIN)/tensorboard --logdir runs"

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n auto --dist worksteal --durations=20
	$(BIN)/python tests/coverage_gate.py

test-quick: lint
	$(BIN)/python -m pytest -n auto --dist worksteal --durations=20 -m "not slow" $(QUICK)

faults: install
	nice $(BIN)/python -m pytest -n 2 --dist worksteal -m "faults or slow" tests/faults

gpu-check:
	failed=0; for call in 1 2 3; do bash benchmarks/gpu_check.sh $$call || failed=1; done; exit $$failed

clean:
	rm -rf .venv build data/demo runs/demo demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage*
