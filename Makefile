# Two commands for newcomers: `make demo` and `make test`. Everything lives in .venv, data/ and runs/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FAISS ?= cpu
# what keeps to itself runs two files at a time; a cluster, a browser and whole runs have the machine to themselves
PARALLEL := tests/guard tests/launcher tests/selfguide tests/spec tests/shards tests/s3 tests/board tests/tools tests/resume_kit $(wildcard tests/test_*.py)
SERIAL := tests/cluster tests/browser tests/end_to_end
# what the tests take
NOTES := .pytest_cache/notes
NOTED := python -m pytest -p tests.slowest --notes $(NOTES)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install install-dev demo demo-latents test test-slow test-faults test-s3-rgw test-fast lint compare compare-latents emoji-latents bench cluster-up cluster-down s3-up s3-down wheel-check clean

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | column -t -s "$$(printf '\t')"

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "== setting up $(VENV): about 5.5 GB, 2 to 5 minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-input -c constraints.txt -e ".[$(FAISS),features]"
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "== installing what the tests need"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-input -c constraints.txt -e ".[$(FAISS),features,dev]"
	@touch $@

install: $(VENV)/installed ## the environment that runs
install-dev: $(VENV)/installed-dev ## and what tests need

demo: install ## real digits as shards, self-guided training on two ranks, evaluation beside it, leaderboard
	@python -m tools.shards make digits --out data/digits
	@python -m launcher.submit experiment=digits_dit cluster=local follow=true
	@python -m launcher.board

# the runs' jobs, samples and scores decode with it
demo-latents compare-latents: export SELFGUIDE_SMALL := $(CURDIR)/data/emoji-vae.safetensors
emoji-latents: install
	@test -e data/emoji/LATEST || python -m tools.shards make emoji --out data/emoji
	@test -e $(SELFGUIDE_SMALL) || python -m tools.vae data/emoji --out $(SELFGUIDE_SMALL)
	@python -m tools.shards encode data/emoji --encoder small --out data/emoji-latents

demo-latents: emoji-latents ## 1,870 emoji in colour: an autoencoder, latents, self-guided training on them, samples; 15 minutes
	@python -m launcher.submit experiment=emoji_dit cluster=local follow=true
	@python -m tools.sample "$$(ls -td runs/emoji_dit/*/ | head -1)" --g 2 --out runs/emoji-samples
	@python -m launcher.board

test: install-dev lint ## all but test-slow, with a real Slurm, a real S3 store and a real browser where this user may install them
	@bash slurm/install.sh || test $$? -eq 3
	@bash tests/browser/install.sh || test $$? -eq 3
	@rm -rf $(NOTES)
	@$(NOTED)/parallel.json -n 2 --dist loadfile -m "not slow and not faults" $(PARALLEL)
	@$(NOTED)/serial.json -m "not faults or quick" $(SERIAL)
	@python -m tests.slowest $(NOTES)

test-faults: install-dev ## long tables of faults, each cell a run of its own
	@python -m pytest -m faults $(PARALLEL) $(SERIAL) || test $$? -eq 5

test-slow: install-dev ## engines that compile, which takes a C++ compiler minutes, whole benchmarks, and further variants of long runs
	@python -m pytest -m slow $(PARALLEL)

test-s3-rgw: install-dev ## the tests of S3 against a second store, Ceph's gateway from Debian's packages
	@bash tools/s3/install.sh
	@SELFGUIDE_S3_STORE=rgw python -m pytest tests/s3

test-fast: install-dev ## what needs no service and no minutes
	@python -m pytest -n 2 --dist loadfile -m "not slow and not faults" $(filter-out tests/s3 tests/guard tests/launcher $(wildcard tests/test_*.py),$(PARALLEL))

lint: install-dev ## style, types, and the direction of imports
	@ruff check .
	@ruff format --check .
	@mypy
	@lint-imports

compare: install ## digits_dit against digits_uncond and digits_class, three seeds each (about 35 minutes)
	@python -m tools.shards make digits --out data/digits
	@python -m tools.compare --figure runs/compare.png
	@python -m launcher.board

compare-latents: emoji-latents ## emoji_dit against emoji_uncond and emoji_class, two seeds each (about an hour)
	@python -m tools.compare --data emoji --seeds 0 1 --figure runs/compare-emoji.png
	@python -m launcher.board

bench: install-dev ## every benchmark suite, variants in turn, beside other packages
	@python -m tools.bench

cluster-up: install ## a real Slurm cluster of four nodes on this machine
	@bash slurm/install.sh
	@python -m slurm up

cluster-down: install ## and gone without trace
	@python -m slurm down

s3-up: install ## a real S3 store on this machine (OpenStack Swift); prints what a shell needs to reach it
	@python -m tools.s3 up

s3-down: install ## and gone without trace, with all that it held
	@python -m tools.s3 down

wheel-check: install-dev ## the built wheel, installed elsewhere, answers a dry run from /
	@bash tools/wheel_check.sh

clean: ## caches and build output; runs/ and data/ stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
