# make serve   install what is missing, then serve the demo checkpoint on the CPU: http://127.0.0.1:8000
# make serve MODEL=FOLDER PORT=9000   the same with another checkpoint folder and port
# make serve DEVICE=cuda MODEL=FOLDER   the same on a GPU machine
# make test    install what is missing, then every check: lint, types, import contracts, tests
# make test-clients   other people's clients (openai for Python and Node, langchain, litellm) and schemathesis against the server
# make test-load      five times the load it can answer for a minute, then half an hour of mixed load: nothing else may run
# Not `?=`: environments have variables of these names that mean something else. Unset HOST and PORT leave the server's own
# settings (PROSPARSE_HOST, …) in force.
PYTHON = python3
DEVICE = cpu
MODEL = deploy/demo
HOST =
PORT =
VLLM_FLAGS =

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SERVE_READY := $(VENV)/.ready-$(DEVICE)
DEV_READY := $(VENV)/.ready-dev
CLIENTS := .venv-clients
CLIENTS_READY := $(CLIENTS)/.ready
NODE_CLIENT := tests/e2e/clients/node

.PHONY: serve test test-clients test-load test-gpu install build lint types contracts unit format clean
.DELETE_ON_ERROR:

serve: $(SERVE_READY)
	$(BIN)/prosparse serve $(MODEL) $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT)) -- $(VLLM_FLAGS)

install: $(SERVE_READY)

# Keep pytest last: its summary closes the log.
test: lint types contracts unit

lint: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV_READY)
	$(BIN)/mypy

contracts: $(DEV_READY)
	$(BIN)/lint-imports

unit: $(DEV_READY)
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

# In an environment of their own, as their users have them; what needs node is skipped where there is none.
test-clients: $(SERVE_READY) $(CLIENTS_READY)
	PROSPARSE=$(CURDIR)/$(BIN)/prosparse $(CLIENTS)/bin/python -m pytest -W default tests/e2e/clients $(PYTEST_FLAGS)

test-load: $(DEV_READY)
	$(BIN)/python -m tests.e2e.overload
	$(BIN)/python -m tests.e2e.soak

# What needs an NVIDIA GPU, with the machine's own Python: CI has none, results are kept under docs/results/.
test-gpu:
	$(PYTHON) -m pytest -m gpu tests/gpu $(PYTEST_FLAGS)

format: $(DEV_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Builds the kernels ahead of time; without this the first start does it. DEVICE=cuda: the CUDA kernels, with nvcc.
build: $(SERVE_READY)
	$(BIN)/prosparse build --device $(DEVICE)

clean:
	rm -rf $(VENV) $(CLIENTS) $(NODE_CLIENT)/node_modules build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "prosparse: $(PYTHON) is older than Python 3.11. Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready-cpu: requirements/torch-cpu.txt requirements/cpu.txt pyproject.toml | $(BIN)/python
	@echo "Installing the CPU server into $(VENV) (two to four minutes the first time) …"
	@requirements/install-torch-cpu $(BIN)/python
	$(PIP) install --no-deps -r requirements/cpu.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	@$(BIN)/prosparse build || echo "Going on without them: plain PyTorch computes every layer densely."
	@touch $@

$(VENV)/.ready-cuda: pyproject.toml | $(BIN)/python
	@echo "Installing the GPU server into $(VENV) …"
	$(PIP) install --editable '.[cuda]'
	@$(BIN)/prosparse build --device cuda || echo "Going on without them: plain PyTorch computes every layer densely."
	@touch $@

$(DEV_READY): requirements/dev.txt $(SERVE_READY)
	$(PIP) install --no-deps -r requirements/dev.txt
	@touch $@

$(CLIENTS_READY): requirements/clients.txt $(NODE_CLIENT)/package-lock.json | $(BIN)/python
	$(BIN)/python -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps -r requirements/clients.txt
	if command -v npm > /dev/null; then cd $(NODE_CLIENT) && npm ci --silent; fi
	@touch $@
