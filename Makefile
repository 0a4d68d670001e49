# `make` alone lists the targets. Each works on a bare machine with Python 3.11-3.13 and make:
# whatever needs the environment builds .venv first, once.

VENV := .venv
NPROC ?= 2
ARGS ?=
SCRIPT ?=
EXPORT ?= precision=int8

ACCEPT := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	"$$p" -c '$(ACCEPT)' 2>/dev/null && echo "$$p" && break; done)

# An NVIDIA driver answers: the CUDA stack. Override with STACK=cpu or STACK=cuda13.
ifndef STACK
STACK := $(shell { nvidia-smi -L || cat /proc/driver/nvidia/version; } >/dev/null 2>&1 \
	&& echo cuda13 || echo cpu)
endif

# Cores are shared out over the ranks; PyTorch's default of all cores for each rank is slower than one.
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
THREADS := $(shell n=$$(( $(CORES) / $(NPROC) )); echo $$(( n > 0 ? n : 1 )))

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready-$(STACK)
HALF := $(VENV)/.half-done
FAILED = { echo "make setup: $(1)" >&2; exit 1; }
NETWORK := see pip's message above. Check the network, the disk and pip's index settings \
	(PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS), then run make setup again

.DEFAULT_GOAL := help
.PHONY: help setup train test check types bench bench-gpu doctor clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## Build .venv with the pinned stack, once (STACK=cpu|cuda13, PYTHON=python3.12)

$(READY): $(wildcard requirements/*.txt) pyproject.toml
	@case "$(STACK)" in cpu|cuda13) ;; *) \
	$(call FAILED,STACK is '$(STACK)'. Choose STACK=cpu or STACK=cuda13.);; esac
	@test -n "$(PYTHON)" && "$(PYTHON)" -c '$(ACCEPT)' || $(call FAILED,\
	no Python 3.11 to 3.13 with venv and pip was found (PYTHON=$(PYTHON)). Install one; on Debian and \
	Ubuntu: apt install python3.11 python3.11-venv. Or name it: make setup PYTHON=/path/to/python3.12.)
	@if test -e $(HALF); then echo "an earlier setup was broken off: starting again"; rm -rf $(VENV); fi
	@$(VENV)/bin/python -c '$(ACCEPT)' 2>/dev/null && $(PIP) --version >/dev/null 2>&1 || \
	"$(PYTHON)" -m venv --clear $(VENV) || \
	$(call FAILED,$(PYTHON) -m venv $(VENV) failed. Remove the folder $(VENV) and run make setup again.)
	@rm -f $(VENV)/.ready-*; touch $(HALF)
	@$(if $(filter cpu,$(STACK)),$(PIP) show -q fbgemm-gpu,$(PIP) show -q fbgemm-gpu-cpu) >/dev/null 2>&1 && \
	$(PIP) uninstall -q -y fbgemm-gpu fbgemm-gpu-cpu || true
	@echo "installing torch, then the rest of requirements/$(STACK).txt (minutes, once)"
	@$(PIP) install -q -r requirements/torch.txt -c requirements/common.txt || $(call FAILED,\
	torch could not be installed: $(NETWORK).)
	@$(PIP) install -q --no-deps -r requirements/$(STACK).txt -r requirements/dev.txt || $(call FAILED,\
	requirements/$(STACK).txt could not be installed: $(NETWORK).)
	@$(PIP) install -q --no-deps --no-build-isolation -e . || $(call FAILED,\
	tightrec itself could not be installed: see pip's message above.)
	@rm -f $(HALF); touch $@; echo "$(VENV) is ready ($(STACK)); make doctor looks closer"

# Where the trainer names its run folder once it has finished; a second training at once has another file.
train: export TIGHTREC_HANDOVER := $(if $(filter none,$(EXPORT)),,$(shell mktemp -u))
train: setup ## Train on NPROC=2 ranks, export a snapshot (ARGS="data=movielens ..." EXPORT="precision=int4"|none)
	OMP_NUM_THREADS=$(THREADS) $(VENV)/bin/torchrun --standalone --nproc-per-node $(NPROC) -m tightrec.trainer $(ARGS)
ifneq ($(strip $(EXPORT)),none)
	@run=$$($(VENV)/bin/python -m tightrec.trainer.handover) || exit; test -z "$$run" || { set -x; \
	$(VENV)/bin/python -m tightrec.snapshot export "checkpoint=$$run" "out=$$run/snapshot" replace=true $(EXPORT); }
endif

test: setup ## Run the tests (ARGS="tests/unit -k schema" passes words to pytest)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(ARGS)

check: setup types ## Lint, format and type check
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# mypy does not see through an editable install's import hook, and the folders stand at the root:
# it is shown a folder tightrec/ of links instead, and its paths are turned back into ours.
types: setup
	@rm -rf build/types && mkdir -p build/types/tightrec
	@for folder in $$(sed -n 's/^"tightrec\.[a-z]*" = "\([a-z]*\)"$$/\1/p' pyproject.toml); do \
	ln -s "$(CURDIR)/$$folder" "build/types/tightrec/$$folder"; done
	@echo mypy -p tightrec; MYPYPATH=build/types $(VENV)/bin/mypy -p tightrec >build/types/log; status=$$?; \
	sed 's#build/types/tightrec/##' build/types/log; exit $$status

bench-gpu: ## Check and measure the codec on one GPU (ARGS="--out FOLDER"); needs torch, CuPy, numpy, pytest alone
	@$(or $(wildcard $(VENV)/bin/python),python3) benchmarks/gpu.py $(ARGS)

bench: setup ## Run benchmarks/SCRIPT.py with ARGS; without SCRIPT, list the scripts
ifeq ($(SCRIPT),)
	@for script in $$(grep -l "__main__" benchmarks/*.py); do \
	printf '  make bench SCRIPT=%-20s %s\n' "$$(basename "$$script" .py)" \
	"$$(sed -n 's/^"""\([^"]*\).*/\1/p' "$$script" | head -n 1)"; done
else
	OMP_NUM_THREADS=$(THREADS) $(VENV)/bin/python benchmarks/$(SCRIPT).py $(ARGS)
endif

doctor: setup ## Say what is installed, what belongs together and what is off
	@$(VENV)/bin/python -m tightrec.trainer.doctor $(ARGS)

clean: ## Remove build products and caches (.venv and runs/ stay)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name $(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove .venv as well
	rm -rf $(VENV)
