# Everything a fresh machine needs: `make demo` and `make test` set up .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= gpu-check-out
STAGE ?= first

.PHONY: demo test lint gpu-check gpu-rehearsal clean
demo: $(READY)
	$(BIN)/python scripts/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# Runs with the python that is there, so that a machine with its own PyTorch needs no installation.
gpu-check:
	$(PYTHON) scripts/gpu_check.py --stage=$(STAGE) --out=$(OUT)

# The same stage with tiny networks on the CPU.
gpu-rehearsal: $(READY)
	$(BIN)/python scripts/gpu_check.py --rehearse --stage=$(STAGE) --out=$(OUT)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'Error: $(PYTHON) is missing or older than Python 3.10; run make with PYTHON=python3.12 or similar'; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $(READY)

clean:
	rm -rf $(VENV) demo-run
