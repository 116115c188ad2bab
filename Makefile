# Two commands matter: `make demo` and `make test`. Both set up all they need.
PYTHON ?= python3
RUNTIME := .venv
DEV := .venv-dev
TRITON := .triton
TINY := runtime/ltx_trt/ltx_tiny

.PHONY: demo test lint triton templates bundle clean

demo: $(RUNTIME)/.ready build/ltx-tiny/manifest.json
	$(RUNTIME)/bin/python tools/demo.py --bundle build/ltx-tiny --out demo

test: $(DEV)/.ready
	$(DEV)/bin/python -m pytest -n 2 --dist loadfile

lint: $(DEV)/.ready
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy

# A real Triton Inference Server beside the tests, without Docker or GPU (225 MB). Where there is
# none for this machine, its tests say so and are skipped.
triton: $(DEV)/.ready
	tools/install_triton.sh $(TRITON) $(DEV)/bin/python

# The traced graphs that the exporter ships, made anew from ltx_ref (five minutes).
templates: $(DEV)/.ready
	$(DEV)/bin/python tools/make_templates.py

# The graphs and the manifest that are shipped beside ltx-tiny's checkpoint, made anew.
bundle: $(DEV)/.ready
	rm -f build/ltx-tiny/manifest.json
	$(MAKE) build/ltx-tiny/manifest.json
	cp build/ltx-tiny/*.onnx build/ltx-tiny/manifest.json $(TINY)/
	cp build/ltx-tiny/text_encoder/*.json $(TINY)/text_encoder/

# The runtime and the exporter: no torch in it.
$(RUNTIME)/.ready: pyproject.toml
	$(PYTHON) -m venv $(RUNTIME)
	$(RUNTIME)/bin/pip install --quiet --editable '.[onnxruntime,export]'
	touch $@

# Everything: tracing, tests, checks. The original package pins versions of 2025 that it does not
# need, so it comes without its dependencies; its tests use only what is installed here.
$(DEV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/pip install --quiet --editable '.[dev]'
	$(DEV)/bin/pip install --quiet --no-deps ltx-video==0.1.2
	touch $@

build/ltx-tiny/manifest.json: $(RUNTIME)/.ready $(TINY)/ltx-tiny.safetensors
	$(RUNTIME)/bin/ltx-export onnx $(TINY)/ltx-tiny.safetensors --text-encoder $(TINY)/text_encoder \
	    --pipeline-config tools/tiny/ltx-tiny.yaml --out build/ltx-tiny --overwrite
	touch $@

clean:
	rm -rf $(RUNTIME) $(DEV) $(TRITON) build demo
