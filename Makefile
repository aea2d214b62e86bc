# What a person runs from the root of a clone. Every target sets up .venv first if that is needed.
# On a machine without a GPU, PIP_EXTRA_INDEX_URL may name PyTorch's CPU index: it saves gigabytes of CUDA.
PYTHON ?= python3
BIN := .venv/bin
DEMO := recipes/configs/demo
MODEL ?= out/demo/rl
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
CORES := $(shell nproc)
LAUNCH := $(BIN)/accelerate launch --quiet --config_file recipes/accelerate/one_cpu.yaml --num_cpu_threads_per_process $(CORES) -m

.DEFAULT_GOAL := help
.PHONY: help install demo chat web test test-versions test-lowest test-newest browser-test hf-tests gpu-check lint bench figures docs docs-test clean fault-test

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: .venv/.installed ## set up .venv with the tested versions

.venv/.installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or later is needed, this is " + sys.version)'
	@echo 'Setting up .venv with PyTorch and Transformers: some minutes, once.'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

demo: .venv/.installed ## data, tokenizer, pretraining, SFT, RL, evaluation, chat and report in out/demo
	@echo 'From nothing to a model that chats, in out/demo: eight minutes on two cores that multiply bfloat16, a quarter of an hour on others. The same command goes on where it stopped.'
	$(BIN)/nanochat prepare_data --config $(DEMO)/data.yaml
	$(BIN)/nanochat train_tokenizer --config $(DEMO)/tokenizer.yaml
	$(LAUNCH) modeling_nanochat.recipes.pretrain --config $(DEMO)/pretrain.yaml
	$(LAUNCH) modeling_nanochat.recipes.sft --config $(DEMO)/sft.yaml
	$(LAUNCH) modeling_nanochat.recipes.rl --config $(DEMO)/rl.yaml
	$(BIN)/nanochat evaluate --config $(DEMO)/evaluate.yaml
	$(BIN)/nanochat chat --model out/demo/rl --temperature 0 --prompt 'What is 12 + 30?'
	$(BIN)/nanochat report --config $(DEMO)/report.yaml
	@echo 'Next: make chat (talk to it), make web (in the browser), out/demo/report.html (what happened).'
	@echo 'Then: your own persona (docs/finetuning.md), or one GPU and a real model (docs/recipes.md).'

chat: .venv/.installed ## talk to the demo's model in the terminal (MODEL=... for another)
	$(BIN)/nanochat chat --model $(MODEL)

web: .venv/.installed ## talk to it in the browser
	$(BIN)/nanochat chat_web --model $(MODEL)

test: .venv/.installed ## every test, on two workers
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 15

browser-test: .venv/.installed ## the chat page in a headless Chromium (skipped where there is none)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -rs tests/browser

hf-tests: .venv/.installed ## Transformers' own common tests of a model, run against ours
	$(BIN)/python -m tests.hf.run

gpu-check: .venv/.installed ## what is promised of one GPU, tried on the one here: five minutes, a table and a file to send in
	$(BIN)/python -m tests.gpu.run

test-versions: ## the quick tests on the lowest and on the newest versions that setup.py admits
	@echo 'Two throw-away environments, .versions/lowest and .versions/newest, each set up and tested: about 20 minutes on'
	@echo 'two cores, and 10 GB of disk where the newest PyTorch comes with CUDA. One of them: make test-lowest, make test-newest.'
	$(MAKE) --no-print-directory --keep-going test-lowest test-newest

test-lowest test-newest: test-%: .versions/%.txt
	@echo 'Setting up .versions/$*: some minutes.'
	$(BIN)/python -m venv --clear .versions/$*
	.versions/$*/bin/pip install --quiet --disable-pip-version-check --constraint $< --editable '.[demo,dev]'
	.versions/$*/bin/pip list --disable-pip-version-check --format freeze > .versions/$*.installed.txt
	HF_HUB_OFFLINE=1 .versions/$*/bin/python -m pytest -n 2 --dist worksteal -m 'not slow'

# uv finds the lowest versions, which pip cannot; pip installs, so that its configuration (indexes, links) holds.
.versions/lowest.txt: .venv/.installed setup.py
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade --target .versions/uv 'uv>=0.9'
	.versions/uv/bin/uv --quiet pip compile --python $(BIN)/python --resolution lowest-direct --extra demo --extra dev \
		setup.py --output-file $@

.versions/newest.txt: .venv/.installed
	mkdir -p .versions
	touch $@  # nothing is held back

fault-test: .venv/.installed ## every stage killed, stopped, damaged and disturbed: the table of docs/reliability.md; a quarter of an hour on two cores
	$(BIN)/python -m tests.faults.run

lint: .venv/.installed ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/.installed ## every benchmark, one after another; the studies (benchmarks/*_study.py) take longer and run alone
	for file in $(filter-out %_study.py,$(wildcard benchmarks/*.py)); do $(BIN)/python -m benchmarks.$$(basename $$file .py) || exit 1; done

FIGURES := out/figures
figures: .venv/.installed ## the essay's pictures, from a small run of each stage (half an hour on two quiet cores)
	$(BIN)/nanochat prepare_data --config $(DEMO)/data.yaml --output_dir $(FIGURES)/data
	$(BIN)/nanochat train_tokenizer --config $(DEMO)/tokenizer.yaml --data $(FIGURES)/data/pretrain --output_dir $(FIGURES)/tokenizer
	$(LAUNCH) modeling_nanochat.recipes.pretrain --config $(DEMO)/pretrain.yaml --max_steps 128 --max_minutes 600 \
		--data $(FIGURES)/data/pretrain --tokenizer $(FIGURES)/tokenizer --output_dir $(FIGURES)/base
	for script in docs/figures/*.py; do $(BIN)/python $$script || exit 1; done

docs: .venv-docs/.installed ## the pages as a site, out/site/index.html
	.venv-docs/bin/sphinx-build -q -b html docs out/site

.venv-docs/.installed: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --disable-pip-version-check --requirement docs/requirements.txt
	touch $@

docs-test: .venv/.installed ## commands, snippets, quotations, pointers and pictures of README and pages
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/docs

clean: ## remove what the demo made (out/), test-versions and caches; .venv stays
	rm -rf out .versions .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
