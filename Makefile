# Every target sets up what it needs: a bare machine with python3 and a package registry is enough.
VENV   := .venv
PYTHON := $(VENV)/bin/python
STAMP  := $(VENV)/installed
# Needs torch while it is built and asks for a desktop OpenCV: installed last, without what it asks for.
GROUNDING := groundingdino-py==0.4.0 supervision==0.6.0
RUN    := $(VENV)/bin/subject-diffusion

# Threads that wait by spinning make small tensors ten times slower on a machine that is busy with something else.
demo test test-slow: export OMP_WAIT_POLICY ?= passive

.PHONY: demo test test-slow browser lint toybox
.DEFAULT_GOAL := test

$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || python3 -m venv $(VENV)
	@echo "installing into $(VENV): some minutes, once"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable ".[data,train,evaluate,ray,test]"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check addict matplotlib timm yapf
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps $(GROUNDING)
	@touch $(STAMP)

demo: $(STAMP)
	@$(RUN) generate --config configs/infer/demo.yaml

test: lint
	$(PYTHON) -m pytest -n 2 --dist loadfile

test-slow: lint browser
	$(PYTHON) -m pytest -m "slow or browser"

# Debian's Chromium where it can be installed; without one the browser tests are skipped and say so.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null || (apt-get update -qq && apt-get install -qq -y chromium) \
		|| echo "no Chromium: browser tests will be skipped"

lint: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

# Every model of the toybox from nothing, in the order in which they stand on each other. Resumes where it was stopped.
toybox: $(STAMP)
	for model in vae clip base subject region_clip judge_identity judge_segment; do \
		$(RUN) train --config configs/train/toybox/$$model.yaml || exit 1; \
	done
	$(PYTHON) scripts/export_toybox.py
	$(PYTHON) scripts/bench_toybox.py --card model/weights/toybox/subject/README.md
