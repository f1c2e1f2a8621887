# One command each: reproduce the series, take a finished run's results into the repository, test, lint, tidy up.
#   make reproduce PROFILE=cpu FORCE=1      make publish PROFILE=cpu      make test      make lint      make clean
PYTHON  ?= python3
PROFILE ?= cpu
FORCE   ?=
# The torch that is installed where there is none yet; one that is already there is kept.
TORCH   ?= 2.13.0

# An active environment is used as it is (conda's base does not count); otherwise .venv is made.
CONDA := $(if $(filter base,$(CONDA_DEFAULT_ENV)),,$(CONDA_PREFIX))
ENV   := $(or $(VIRTUAL_ENV),$(CONDA),$(CURDIR)/.venv)
RUN   := "$(ENV)/bin/python"
STAMP := "$(ENV)/.lora_distill"

.PHONY: reproduce publish test lint install clean

reproduce: install
	$(RUN) -m lora_distill reproduce --profile $(PROFILE) $(if $(FORCE),--force)

publish: install
	$(RUN) -m lora_distill publish --profile $(PROFILE)

# Two workers with one thread each: tests are many small networks, which a second thread does not make faster.
# nbval hands the name after --cov= on to the kernels, and hangs without one. The rehearsal takes over what smoke has
# simulated of Stable Diffusion 1.5's memory, half of its time.
test: install
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --cov=lora_distill --cov-report=
	rm -rf runs/smoke runs/rehearsal
	$(RUN) -m lora_distill prepare --profile smoke
	$(RUN) -m pytest -x --nbval-lax --nbval-current-env build/notebooks \
		--cov=lora_distill --cov-append --cov-report=term --cov-fail-under=85
	mkdir -p runs/rehearsal/cache && cp runs/smoke/cache/simulate-* runs/rehearsal/cache/
	$(RUN) -m lora_distill rehearse

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Installed anew when pyproject.toml is newer than the stamp, or when the stamp is another checkout's.
install:
	@if [ ! -x $(RUN) ]; then \
		"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
			|| { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
		"$(PYTHON)" -m venv "$(ENV)"; \
	fi
	@if [ ! $(STAMP) -nt pyproject.toml ] || [ "$$(cat $(STAMP))" != "$(CURDIR)" ]; then \
		set -e; \
		$(RUN) -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null \
			|| $(RUN) -m pip install torch==$(TORCH); \
		$(RUN) -m pip install -e ".[series,cpu,test,dev]"; \
		echo "$(CURDIR)" > $(STAMP); \
	fi

# Leaves runs/ alone: it holds what took long to train.
clean:
	rm -rf build *.egg-info .coverage .pytest_cache .ruff_cache runs/smoke runs/rehearsal*
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
