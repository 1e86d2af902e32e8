# Two commands do everything on a fresh machine: `make demo` and `make test`.
# On Linux, TORCH_INDEX=https://download.pytorch.org/whl/cpu avoids the CUDA libraries of the default torch.
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN = $(VENV)/bin
INSTALL = $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: demo test check clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(INSTALL) -e ".[dev,demo,fast,lab]"
	touch $@

demo: $(VENV)/installed
	HF_HUB_OFFLINE=1 $(BIN)/python examples/demo/run.py

test: $(VENV)/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: test
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .demo .bench build dist *.egg-info
