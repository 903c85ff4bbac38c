# The only things needed are Python 3.11, gcc, git and make; everything else goes into .venv.
PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: search pipeline test test-fast test-long lint clean

search: $(VENV)/installed
	$(PY) jobs/search.py

# Search, predictor, tokens, their evaluation on test images and a report of it. Stopped at any time, it goes on where it was.
pipeline: search
	$(PY) jobs/search.py --model embedded --shards 'patchrank/assets/shards/test-*.tar.gz' --out test-rankings
	$(PY) jobs/train_predictor.py
	$(PY) jobs/train_tokens.py
	$(PY) jobs/evaluate.py --predictor predictor --tokens tokens --save-bundle bundle
	$(PY) jobs/report.py evaluation

# Two processes, for most tests wait for others that they start; those of a file stay together, as they share a Ray. Files
# by name, so that the longest, tests/cluster, begins.
test: $(VENV)/installed
	$(PY) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 25 -m 'not long'

# What takes minutes and rarely breaks: before a release, and when what it tests was changed.
test-long: $(VENV)/installed
	$(PY) -m pytest --numprocesses 2 --dist loadfile --durations 10 -m long

# What starts no Ray: minutes instead of a quarter of an hour. Files have nothing to share then, and are split.
test-fast: $(VENV)/installed
	$(PY) -m pytest --numprocesses 2 --dist worksteal -m 'not ray and not long'

lint: $(VENV)/installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
