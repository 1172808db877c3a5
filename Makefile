# Two commands matter: `make demo` and `make test`. Everything happens in $(VENV).
PYTHON ?= python3
VENV ?= .venv
# A CPU build is enough for both commands; on a GPU machine pass your own, for example TORCH=torch.
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers==5.23.0
# The oldest transformers supported; `make test` runs a subset of the tests with it.
TRANSFORMERS_FLOOR ?= transformers==4.57.6
OUT ?= demo
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
FLOOR := $(VENV)-floor

.PHONY: demo test floor lint bench gpu clean

$(PY):
	$(PYTHON) -m venv $(VENV)

# torch first: the extension is compiled against the torch that will load it.
$(INSTALLED): pyproject.toml setup.py | $(PY)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja numpy
	$(PY) -m pip install --quiet "$(TRANSFORMERS)"
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[eval,test]"
	touch $@

# Rebuilds what changed in csrc; a machine without a compiler keeps the PyTorch path.
.PHONY: ext
ext: $(INSTALLED)
	$(PY) setup.py --quiet build_ext --inplace

demo: ext
	$(PY) -m lowcontext.eval.demo --out $(OUT)

test: ext floor
	$(PY) -m pytest
	$(FLOOR)/bin/python -m pytest tests/integrations/test_transformers_floor.py

# A second environment with the oldest transformers; torch and the rest come from the first one.
floor: $(FLOOR)/.installed

$(FLOOR)/.installed: $(INSTALLED)
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet "$(TORCH)" "$(TRANSFORMERS_FLOOR)" \
		einops numpy pytest accelerate typer rich pyyaml
	touch $@

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy lowcontext

bench: ext
	$(PY) -m bench.run --suite cpu-prefill --suite cpu-decode
	$(PY) -m bench.compare bench/results

gpu:
	$(PYTHON) -m bench.gpu --out $(or $(GPU_OUT),bench/results)

clean:
	rm -rf build $(VENV) $(FLOOR) lowcontext/*.so
