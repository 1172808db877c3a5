# Two commands matter: `make demo` and `make test`. Everything happens in $(VENV).
PYTHON ?= python3
VENV ?= .venv
# A CPU build is enough for both commands; on a GPU machine pass your own, for example TORCH=torch.
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers==5.23.0
# The oldest transformers supported; `make test` runs a subset of the tests with it.
TRANSFORMERS_FLOOR ?= transformers==4.57.6
OUT ?= demo
RESULTS ?= bench/results
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
FLOOR := $(VENV)-floor

.PHONY: demo test ext floor lint bench gpu clean

$(PY):
	$(PYTHON) -m venv $(VENV)

# torch first: the extension is compiled against the torch that will load it.
$(INSTALLED): pyproject.toml setup.py | $(PY)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja numpy
	$(PY) -m pip install --quiet "$(TRANSFORMERS)"
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[eval,test]"
	touch $@ $(BUILT)

# pip has built the extension; this builds it again when csrc changes. A machine without a compiler
# keeps the PyTorch path.
ext: $(BUILT)

# (In the run that installs, make has not seen that pip has just built it.)
$(BUILT): $(INSTALLED) $(wildcard csrc/*.* csrc/*/*.*)
	[ -e $@ ] && [ -z "$$(find csrc -newer $@)" ] || $(PY) setup.py --quiet build_ext --inplace
	touch $@

# Budgets small enough to select at 1K; Quest without its dense layers, since the model has three.
demo: ext
	$(VENV)/bin/lowcontext checkpoint $(OUT)/retrieval
	$(VENV)/bin/lowcontext needle $(OUT)/retrieval --out $(OUT) --lengths 1k,4k,16k --depths 5 \
		-m dense -m streaming_llm:window=256 -m block_topk:budget=640 \
		-m quest:budget=512,dense_layers=0

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

# Builds, tests and measures in the Python that runs it, without an install: see bench/gpu.py.
gpu:
	$(PYTHON) -m bench.gpu --out $(RESULTS) $(GPU_OPTIONS)

clean:
	rm -rf build $(VENV) $(FLOOR) lowcontext/*.so
