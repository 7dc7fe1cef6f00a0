# snatd. `make help` lists what there is.

PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
BACKEND ?= nft

# What the tests, the demo and the virtual environment need of Debian 12 or 13.
PACKAGES := iptables nftables iproute2 conntrack procps util-linux strace \
	python3 python3-venv python3-dev gcc libc6-dev

.PHONY: help venv demo test bench clean packages

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

packages:
	@missing=; for package in $(PACKAGES); do \
	  dpkg-query -W -f '$${db:Status-Status}\n' $$package 2>/dev/null | grep -qx installed \
	    || missing="$$missing $$package"; \
	done; \
	if [ -n "$$missing" ]; then \
	  echo "installing by apt:$$missing"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	fi

venv: $(BIN)/.complete  ## make .venv/bin/snatd with everything that the tests need

$(BIN)/.complete: pyproject.toml | packages
	@echo "installing into $(VENV): the dependencies of pyproject.toml and the test tools"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/pip install -qq --disable-pip-version-check --editable '.[test]'
	@touch $@

demo: venv  ## see the problem and its repair between two nodes (BACKEND=legacy for the other tables)
	@$(BIN)/python -m tests.lab.demo --backend $(BACKEND)

test: venv  ## unit, property and kernel tests, linters included
	@$(BIN)/python -m pytest

bench: venv  ## measure, and print a table
	@$(BIN)/python -m tests.bench

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
