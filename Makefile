# make demo | make lint test | make test-oldest | make soak | make paper DATA=FOLDER | make paper-small
# An active virtual environment is used, else .venv is made. ARGS goes to paper.py, or to the demo's
# train_ssl.py: make paper DATA=FOLDER ARGS=--dry-run, make demo ARGS="--epochs 2"
VENV := $(or $(VIRTUAL_ENV),.venv)
PYTHON := $(VENV)/bin/python
REQUIREMENTS := requirements.txt

again:
.PHONY: install demo lint test test-oldest soak paper paper-small again

install: $(VENV)/.installed

# .installed names the file of requirements it was made from; another file, or a newer one, installs anew
$(VENV)/.installed: $(REQUIREMENTS) requirements-dev.txt $(if $(filter $(REQUIREMENTS),$(shell cat $(VENV)/.installed 2>/dev/null)),,again)
	test -x $(PYTHON) || python3 -m venv $(VENV)
	@echo "installing $(REQUIREMENTS): about 3 minutes and 6 GB the first time"
	$(PYTHON) -m pip install --disable-pip-version-check -r $(REQUIREMENTS) -r requirements-dev.txt
	@echo $(REQUIREMENTS) > $@

runs/demo-scenes: install
	test -d $@ || $(PYTHON) -m data.synthetic $@ --layout pure --count 5800 --size 64

# many images, seen at half their size: docs/levers.md
demo: runs/demo-scenes
	$(PYTHON) train_ssl.py --method simclr --data runs/demo-scenes --size 32 --epochs 16 $(ARGS) --out runs/demo
	$(PYTHON) transfer.py --task scene --mode linear --init random channels runs/demo/backbone.pth \
	    --data runs/demo-scenes --size 64 --ratios 100 --seeds 1 --out runs/demo/transfer
	@echo "The log is runs/demo/log.csv, the views are runs/demo/views.png, the curve is runs/demo/curve.png."
	@echo "Next: . $(VENV)/bin/activate && python train_ssl.py --method simclr --data YOUR_PATCHES --size 64"

lint: install
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

test: install
	$(PYTHON) -m pytest -n 2 --dist loadfile

test-oldest:  # with the oldest versions that requirements.txt allows, in an environment of its own
	test -x .venv-oldest/bin/python || python3 -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q -r requirements-oldest.txt -r requirements-dev.txt
	.venv-oldest/bin/python -m pytest -n 2 --dist loadfile

soak: install
	$(PYTHON) tests/soak.py

paper paper-small: export DATA := $(DATA)

paper: install
	$(PYTHON) paper.py --data "$${DATA:?say where the two datasets are: make paper DATA=FOLDER}" $(ARGS)

paper-small: install
	$(PYTHON) paper.py --small $${DATA:+--data "$$DATA"} $(ARGS)
