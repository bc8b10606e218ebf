# make demo | make test | make paper DATA=FOLDER | make paper-small: everything from a fresh checkout.
# An active virtual environment is used, else .venv is made. ARGS goes to paper.py: make paper DATA=FOLDER ARGS=--dry-run
VENV := $(or $(VIRTUAL_ENV),.venv)
PYTHON := $(VENV)/bin/python
REQUIREMENTS := requirements.txt

.PHONY: install demo test paper paper-small

install: $(VENV)/.installed

$(VENV)/.installed: $(REQUIREMENTS) requirements-dev.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q -r $(REQUIREMENTS) -r requirements-dev.txt
	touch $@

demo: install
	$(PYTHON) train_ssl.py --method barlow --out runs/demo
	$(PYTHON) transfer.py --task scene --mode linear --init random channels runs/demo/backbone.pth \
	    --data runs/cache/scenes-pure-2900-64 --size 64 --ratios 100 --seeds 1 --out runs/demo/transfer
	@echo "The log is runs/demo/log.csv, the views are runs/demo/views.png, the curve is runs/demo/curve.png."
	@echo "Next: . $(VENV)/bin/activate && python train_ssl.py --method simclr --data YOUR_PATCHES --size 64"

test: install
	$(PYTHON) -m pytest -n 2 --dist loadfile

paper paper-small: export DATA := $(DATA)

paper: install
	$(PYTHON) paper.py --data "$${DATA:?say where the two datasets are: make paper DATA=FOLDER}" $(ARGS)

paper-small: install
	$(PYTHON) paper.py --small $${DATA:+--data "$$DATA"} $(ARGS)
