# Two commands matter: `make run` (set up, serve, profile, plan, apply, load, report) and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
REPOSITORY ?= model_repository
WORKLOAD ?= perf/workloads/sample.yaml

.DEFAULT_GOAL := help

.PHONY: help
help: ## this list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-22s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(VENV)/.ready ## make .venv with all that is needed (idempotent)

$(VENV)/.ready: setup.sh setup.cfg pyproject.toml perf/install_perf_analyzer.py
	PYTHON="$(PYTHON)" VENV="$(VENV)" ./setup.sh

.PHONY: models
models: setup ## put the sample models' weights into model_repository/
	$(BIN)/python model_repository/fetch.py

.PHONY: run
run: setup models ## the main job: serve a copy, profile, plan, apply, load; figures in run/result.json
	$(BIN)/dstackctl demo $(REPOSITORY) --workload $(WORKLOAD) --run-dir run

.PHONY: serve
serve: setup models ## serve model_repository/ until interrupted
	$(BIN)/dstackctl serve $(REPOSITORY)

.PHONY: doctor
doctor: setup ## check every needed part of this machine
	$(BIN)/dstackctl doctor

# Tests that start no server run beside those that do, and give way to them; what they say comes last.
PYTEST := $(BIN)/python -m pytest -q -m "not gpu and not slow"
PURE := tests/unit tests/property tests/sim

.PHONY: test
test: export OPENBLAS_NUM_THREADS = 1
test: setup models ## pass the tests (those of a GPU and the long studies apart)
	@mkdir -p run; nice $(PYTEST) $(PURE) > run/pure-tests.log 2>&1 & pure=$$!; \
	trap 'kill $$pure; exit 130' INT TERM; \
	$(PYTEST) --durations=20 $(PURE:%=--ignore=%); real=$$?; \
	wait $$pure; status=$$?; cat run/pure-tests.log; exit $$((real > status ? real : status))

# A GPU host without network has all that is needed in its own Python: PYTHON_OF_GPU=python3 make test-gpu
.PHONY: test-gpu
test-gpu: $(if $(PYTHON_OF_GPU),,setup) ## the tests that need an NVIDIA GPU
	$(or $(PYTHON_OF_GPU),$(BIN)/python) -m pytest -q -m "gpu and not slow" --timeout=90 \
	  -o faulthandler_timeout=75 tests/gpu

.PHONY: test-faults
test-faults: setup ## every fault on a real Triton under load; figures in run/faults.json
	mkdir -p run && rm -f run/faults.json
	OPENBLAS_NUM_THREADS=1 DSTACK_FAULTS_REPORT=run/faults.json $(BIN)/python -m pytest -q \
	  tests/unit/test_health.py tests/unit/test_server_gpu_guard.py tests/unit/test_apply.py tests/integration/test_arbiter_faults.py \
	  tests/integration/test_serve.py tests/integration/test_apply_on_triton.py \
	  tests/integration/test_faults.py tests/integration/test_faults_of_disks_and_clocks.py \
	  tests/integration/test_soak_and_drift.py tests/unit/test_full_disks.py

.PHONY: lint
lint: setup ## ruff and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

.PHONY: types
types: setup ## mypy
	$(BIN)/mypy

.PHONY: perf-planning
perf-planning: setup ## time of the batch and joint programs, and how it grows -> perf/reports/planning.json
	$(BIN)/python perf/planning.py

.PHONY: perf-profile-replay
perf-profile-replay: setup ## the adaptive profiler on recorded H100 surfaces with noise -> perf/reports/profile_replay.json
	$(BIN)/python perf/profile_replay.py

.PHONY: perf-engine
perf-engine: setup ## time of a decision and of a grant's round trip -> perf/reports/engine.json
	$(BIN)/python perf/engine.py

.PHONY: perf-simulation
perf-simulation: setup ## every policy in every simulated cell -> perf/reports/simulation.json and .md
	$(BIN)/python perf/simulation.py

.PHONY: perf-service-world
perf-service-world: setup ## what learning from service is worth, simulated -> perf/reports/service_world.json and .md
	$(BIN)/python perf/service_world.py

.PHONY: perf-forecast
perf-forecast: setup ## forecasts replayed on a recorded trace: lost against provided -> perf/reports/forecast.json
	$(BIN)/python perf/forecast.py

.PHONY: perf-adaptive
perf-adaptive: setup models ## rates that shift every minute: static, adaptive, oracle, 33 min -> perf/reports/adaptive.json and .png
	$(BIN)/python perf/adaptive.py

.PHONY: perf-soak
perf-soak: setup ## half an hour under load with a fault a minute: what grows, what is lost -> perf/reports/soak.json
	$(BIN)/python perf/soak.py $(SOAK)

.PHONY: perf-h100-profiles
perf-h100-profiles: ## on a GPU host with torch: profile eight models -> perf/reports/h100/profiles.json
	$(PYTHON) perf/h100_profiles.py

.PHONY: perf-h100-dataplane
perf-h100-dataplane: ## on a GPU host with torch: what is served against what the GPU can do -> perf/reports/h100/dataplane.json
	$(PYTHON) perf/h100_dataplane.py

.PHONY: perf-h100-compare
perf-h100-compare: ## on a GPU host with torch: D-STACK against the alternatives -> perf/reports/h100/compare.json
	$(PYTHON) perf/h100_compare.py --repeats 3 --curve
