# Every command installs what it needs, in .tools/ and .venv/ only, and writes to build/.

PY := .venv/bin/python

# Jupyter finds the kernel named python3 in .venv, whatever else is installed for this user.
export JUPYTER_PATH := $(CURDIR)/.venv/share/jupyter

# Images of Python often set this. Then each of the many processes compiles every module anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help doctor workbook test lint lab serve bench load book lock clean setup tools

help:
	@echo "Clothes to Cluster"
	@echo
	@echo "  make doctor     look at this machine, and say what each lesson will run on it"
	@echo "  make workbook   execute the lessons and write them as pages to build/workbook/"
	@echo "                  (some of them: make workbook ONLY=\"02 03\")"
	@echo "  make test       run the tests; if a Docker engine answers, build images and run"
	@echo "                  containers, too"
	@echo "                  (some of them: make test ARGS=\"-k gateway\";"
	@echo "                  with those that take long, as CI does: THOROUGH=1 make test)"
	@echo "  make lint       check style and types"
	@echo "  make lab        open the notebooks in JupyterLab"
	@echo "  make serve      run the model server and the gateway until Ctrl-C"
	@echo "                  (with another model: make serve MODEL=build/leaf-model)"
	@echo "  make bench      measure the gateway and the model server, in about twelve minutes, and"
	@echo "                  write build/bench/report.html (more: make bench ARGS=\"--rounds 9\")"
	@echo "  make load       send pictures to a gateway for 30 seconds, with 8 clients, and print how"
	@echo "                  it did: make load HOST=http://localhost:9696 (with Locust's own page at"
	@echo "                  a port: PAGE=8089; see bench/locustfile.py for the rest)"
	@echo "  make book       render the lessons and docs, with the outputs that they are committed with,"
	@echo "                  as a book to build/book/"
	@echo "  make lock       write the newest versions into Pipfile.lock"
	@echo "  make clean      remove everything that these commands have made"
	@echo
	@echo "  PYTHON=...      use this Python (3.11, 3.12 or 3.13)"
	@echo "  WORKBOOK_ENGINE=auto|docker|embedded   what runs TensorFlow Serving"

setup:
	@workbook/setup.sh

tools:
	@workbook/setup.sh tools

# It installs nothing, and takes whatever Python there is.
doctor:
	@python=.venv/bin/python; "$$python" -c '' 2>/dev/null \
	  || python=$$(workbook/setup.sh python 2>/dev/null) || python=python3; \
	command -v "$$python" >/dev/null || exec workbook/setup.sh python; "$$python" -m workbook.doctor

workbook: setup
	@$(PY) -m workbook.run --only $(ONLY)

test: setup
	@$(PY) -m pytest -n 6 --dist loadfile --no-loadscope-reorder $(ARGS)

SCRIPTS := .ci/run workbook/setup.sh .binder/postBuild .devcontainer/create

# .pre-commit-config.yaml has the same commands.
lint: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	@if command -v shellcheck >/dev/null; then echo "shellcheck"; shellcheck $(SCRIPTS); \
	else echo "shellcheck is not installed: $(SCRIPTS) are not checked"; fi

lab: setup
	@$(PY) -m jupyterlab --allow-root --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks

serve: setup
	@$(PY) -m workbook.serve $(MODEL)

bench: setup
	@workbook/setup.sh peers
	@$(PY) -m bench $(ARGS)

# Locust ends with 1 when a request has failed; the table says so, and the command has done its work.
load: setup
	@mkdir -p build/load
	@echo "$(or $(CLIENTS),8) clients; $(if $(PAGE),stop with Ctrl-C,the numbers will be in build/load/)"
	@$(PY) -m locust --locustfile bench/locustfile.py --host $(or $(HOST),http://localhost:9696) \
	  $(if $(PICTURES),--pictures $(PICTURES)) $(if $(TAGS),--tags $(TAGS)) \
	  --users $(or $(CLIENTS),8) --spawn-rate 100 --run-time $(or $(SECONDS),30)s --exit-code-on-error 0 \
	  $(if $(PAGE),--web-host 127.0.0.1 --web-port $(PAGE),--headless --only-summary --loglevel WARNING \
	  --csv build/load/load)

# A book runs nothing, so it does not wait for the packages of the lessons.
book: tools
	@workbook/setup.sh book
	@build/book-venv/bin/python -m workbook.book $(ARGS)

lock: tools
	@.tools/bin/python workbook/lock.py

clean:
	rm -rf build .venv .tools .pytest_cache .ruff_cache .mypy_cache .hypothesis .schemathesis
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -prune -exec rm -rf {} +
