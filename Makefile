# Needs make and Python 3.11 or newer; each target brings .venv up to what it needs, once.
#
#   make demo PYTHON=python3.12     another interpreter for .venv
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                                   CPU wheels of torch: pip's default on Linux brings CUDA, several gigabytes
#   make serve ARGS="--port 9000"   arguments for the command behind a target

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
COMFYUI ?=
SECONDS ?= 1800

BIN := .venv/bin
# An extra index, not another one: a build with a local version (2.13.0+cpu) is preferred to the plain one, and
# whatever pip is configured with keeps working.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve test check fuzz soak mutants audit browser bench bench-gpu comfyui image-test manifests ray wheel train

help:
	@echo 'make demo       start the server, send a picture through it and back, stop it'
	@echo 'make serve      the service on http://127.0.0.1:8000'
	@echo 'make test       every test that needs no GPU (ARGS="-n 0" in one process)'
	@echo 'make check      lint, formatting, types, import contracts'
	@echo 'make fuzz       the long forms of the fuzzing, 10 minutes each (ARGS="api --seconds 60")'
	@echo 'make soak       an hour of mixed traffic, every answer checked, what grows told (ARGS="--seconds 600")'
	@echo 'make mutants    lines of some modules changed one by one: which changes no test notices (SECONDS=1800)'
	@echo 'make audit      known vulnerabilities of the packages in .venv; asks pypi.org'
	@echo 'make browser    the page in chromium: every action, an accessibility audit, pictures in browser-output/'
	@echo 'make bench      CPU: encode and decode beside diffusers (ARGS=--quick for the small sizes)'
	@echo 'make bench-gpu  the GPU tests, then fp16 encode and decode beside diffusers, and the card (ARGS="--json FILE")'
	@echo 'make comfyui    our nodes in a real ComfyUI, beside its own (COMFYUI=path to one that runs)'
	@echo 'make wheel      dist/latentd-*.whl, to install anywhere'
	@echo 'make image-test builds the container image and serves from it: root, buildah, debootstrap'
	@echo 'make manifests  deploy/ against the schemas of Kubernetes, and the rules against promtool'
	@echo 'make ray        replicas on Ray Serve: killed at each stage, requests by model (unshare and ip must be there)'
	@echo 'make train      train the embedded default VAE anew: hours'

# One stamp for each set of packages, inside .venv so that removing it starts over.
.venv/runtime: pyproject.toml
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	@touch $@

.venv/test: .venv/runtime
	$(INSTALL) -e '.[test]'
	@touch $@

.venv/check: .venv/test
	$(INSTALL) -e '.[check]'
	@touch $@

.venv/fuzz: .venv/test
	$(INSTALL) -e '.[fuzz]'
	@touch $@

.venv/mutants: .venv/test
	$(INSTALL) -e '.[mutants]'
	@touch $@

.venv/audit: .venv/runtime
	$(INSTALL) -e '.[audit]'
	@touch $@

.venv/browser: .venv/test
	$(INSTALL) -e '.[browser]'
	@touch $@

.venv/deploy: .venv/test
	$(INSTALL) -e '.[deploy]'
	@touch $@

.venv/ray: .venv/test
	$(INSTALL) -e '.[ray]'
	@touch $@

.venv/train: .venv/runtime
	$(INSTALL) -e '.[train]'
	@touch $@

demo: .venv/runtime
	$(BIN)/python tests/demo.py $(ARGS)

serve: .venv/runtime
	$(BIN)/latentd serve $(ARGS)

# A process for each core with one thread each: the networks are small, and two threads of one wait for each other.
test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not gpu and not browser' -n auto --maxprocesses 8 $(ARGS)

check: .venv/check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	PYTHONWARNINGS=error $(BIN)/lint-imports

fuzz: .venv/fuzz
	$(BIN)/python -m tests.fuzz $(ARGS)

soak: .venv/test
	$(BIN)/python -m benchmarks.soak $(ARGS)

# Ends when its time is up, and goes on where it was the next time; `mutmut show NAME` is what was changed.
mutants: .venv/mutants
	@OMP_NUM_THREADS=1 timeout --signal=INT $(SECONDS) $(BIN)/mutmut run $(ARGS) >mutants.log 2>&1 || true
	@$(BIN)/mutmut results

# Strict: a package that the database cannot be asked about is a failure. It knows torch 2.13.0, not torch 2.13.0+cpu.
audit: .venv/audit
	$(BIN)/python -m pip list --disable-pip-version-check --format=freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' >.venv/frozen
	$(BIN)/pip-audit --strict --no-deps --disable-pip -r .venv/frozen $(ARGS)

browser: .venv/browser
	@$(BIN)/python -c 'import sys; from tests.page.visit import chromium; chromium() or sys.exit("browser: there is no chromium here; install it, or say CHROMIUM=/path/to/it")'
	$(BIN)/pytest tests/page $(ARGS)

bench: .venv/test
	$(BIN)/python -m benchmarks.cpu $(ARGS)

bench-gpu: .venv/test
	@set -e; \
	cuda=$$($(BIN)/python -c 'import torch; print(torch.cuda.is_available())'); \
	if [ "$$cuda" = True ]; then \
		$(BIN)/pytest -m gpu; \
		$(BIN)/python -m benchmarks.gpu $(ARGS); \
	else \
		echo 'bench-gpu: no CUDA device here, nothing was measured'; \
	fi

# ComfyUI keeps its own interpreter: of the venv in its folder or beside it, or ARGS="--python PATH".
comfyui: .venv/test
	@if [ -z '$(COMFYUI)' ]; then \
		echo 'comfyui: say where one is: make comfyui COMFYUI=path (CPU is enough; nothing in it is changed)'; \
	else \
		$(BIN)/python -m tests.comfyui '$(COMFYUI)' $(ARGS); \
	fi

image-test:
	TORCH_INDEX='$(TORCH_INDEX)' tests/deploy/image.sh

wheel: .venv/runtime
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps -w dist .

manifests: .venv/deploy
	@command -v kustomize >/dev/null || command -v kubectl >/dev/null || { echo 'manifests: needs kustomize or kubectl'; exit 1; }
	@command -v promtool >/dev/null || { echo 'manifests: needs promtool, of the package prometheus'; exit 1; }
	$(BIN)/pytest tests/deploy -n 0 $(ARGS)

# Ray listens on all interfaces, whatever it is told: here it has a network with a loopback and nothing else.
ALONE := unshare --net --map-root-user sh -c 'ip link set lo up && exec "$$@"' sh
ray: .venv/ray
	$(BIN)/pytest -n 0 tests/deploy/test_router.py
	OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 $(ALONE) $(BIN)/python -m tests.deploy.deaths
	@for count in 2 4; do \
		OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 $(ALONE) $(BIN)/python -m benchmarks.scaleout \
			--replicas $$count --json ray-$$count.json $(ARGS) || exit 1; \
	done

train: .venv/train
	$(BIN)/python models/train_latentd_small.py $(ARGS)
