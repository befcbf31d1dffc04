# Each target does all of its set-up: a fresh machine needs python3 (3.11 or newer), g++ and make.
VENV := .venv
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check install -q -c constraints.txt

.PHONY: demo test lint clean

demo: $(VENV)/demo
	$(VENV)/bin/mixq demo

test: $(VENV)/dev lint
	TRITON_INTERPRET=1 $(PYTHON) -m pytest -q -n 2 tests/kernels/test_triton_interpreter.py
	ONEDNN_MAX_CPU_ISA=AVX2 $(PYTHON) -m pytest -q tests/kernels/test_cpu.py
	$(PYTHON) -m pytest -q -n 2

lint: $(VENV)/dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(VENV)/torch: constraints.txt
	@command -v g++ >/dev/null || { echo "g++ is missing: CPU kernels and torch.compile need it (Debian, Ubuntu: apt-get install g++)."; exit 1; }
	python3 -m venv $(VENV)
	$(PIP) torch
	@touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml
	$(PIP) -e ".[demo]"
	@touch $@

$(VENV)/dev: $(VENV)/torch pyproject.toml
	$(PIP) -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
