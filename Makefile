# make demo   everything once, on simulated drives, with scores
# make test   the tests; with ROADMILL_REAL_DATA=folder also on real recordings
# make lint   what CI lints

PYTHON ?= python3.11
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: setup test demo lint
setup: $(VENV)/.installed

# The .pth line puts the environment's programs on the PATH of whatever its Python starts: `dvc repro` then runs
# `python -m stages` with this Python, and nobody needs to activate anything.
$(VENV)/.installed: pyproject.toml constraints.txt
	command -v $(PYTHON) >/dev/null && $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(VENV)/bin/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	echo 'import os, sys; os.environ["PATH"] = os.path.join(sys.prefix, "bin") + os.pathsep + os.environ.get("PATH", "")' \
	  > "$$($(VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')/roadmill-path.pth"
	touch $@

test: setup
	python -m pytest $(ARGS)

demo: setup
	roadmill demo

lint: setup
	ruff check .
