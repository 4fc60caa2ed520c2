# make demo: stages 1 to 3 on drawn scenes, with a table. make test: the tests.
# make test-faults: the long ones too. make cifar10: the paper's claim on CIFAR-10, with seeds.
# Each makes .venv first, with PYTHON, an interpreter of 3.10 or newer.
PYTHON ?= python3

demo: .venv/installed
	.venv/bin/python -m tools.demo

test: .venv/installed
	.venv/bin/python -m pytest -q tests

test-faults: .venv/installed
	.venv/bin/python -m pytest -q tests -m "faults or long"

cifar10: .venv/installed
	.venv/bin/python -m tools.cifar10

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv runs/demo

.PHONY: demo test test-faults cifar10 clean
