# snatd. `make help` lists what there is.

PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
BACKEND ?= nft

# What the tests, the demo and the virtual environment need of Debian 12 or 13.
PACKAGES := iptables nftables iproute2 conntrack procps util-linux strace \
	python3 python3-venv python3-dev gcc libc6-dev

# The same for `make deb`, `make rpm` and `make test-system`.
PACKAGING := git build-essential debhelper dh-python pybuild-plugin-pyproject python3-all \
	python3-setuptools python3-pyroute2 python3-sdnotify python3-structlog python3-watchdog rpm
SYSTEM := $(PACKAGING) lintian rpmlint mmdebstrap systemd systemd-container zstd man-db fish zsh bash-completion

# For whom `make rpm` builds.
RPM_FOR ?= el9 el10 fc43

.PHONY: help venv demo test test-faults test-system test-docker fuzz soak bench manual pictures deb rpm
.PHONY: clean packages test-others test-matrix

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

# A target that needs more says so: `deb: PACKAGES += ...`.
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

venv: $(BIN)/.complete $(BIN)/promtool  ## make .venv/bin/snatd with everything that the tests need

$(BIN)/.complete: pyproject.toml | packages
	@echo "installing into $(VENV): the dependencies of pyproject.toml and the test tools"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/pip install -qq --disable-pip-version-check --editable '.[test]'
	@touch $@

# Of Debian 13's package promtool, or Debian 12's prometheus: neither is installed, nothing started.
$(BIN)/promtool: | $(BIN)/.complete
	@echo "unpacking into $(VENV): promtool, as Debian packages it"
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; cd "$$folder"; \
	get() { apt-get download -qq -o APT::Sandbox::User=root "$$1"; }; \
	any() { get promtool 2>/dev/null || get prometheus; }; \
	{ any 2>/dev/null || { apt-get update -qq && any; }; } && \
	dpkg-deb --fsys-tarfile *.deb | tar -x ./usr/bin/promtool && \
	install usr/bin/promtool $(CURDIR)/$@

demo: $(BIN)/.complete  ## see the problem and its repair between two nodes (BACKEND=legacy for the other tables)
	@$(BIN)/python -m tests.lab.demo --backend $(BACKEND)

test: venv  ## unit, property and kernel tests, linters included
	@$(BIN)/python -m pytest

test-faults: venv  ## the faults that take over 5 s each, the others are in `make test`; needs root
	@$(BIN)/python -m pytest -m long tests/faults

deb: PACKAGES := $(PACKAGING)
deb: packages  ## build dist/snatd_VERSION_all.deb of the last commit
	@packaging/deb dist

rpm: PACKAGES := $(PACKAGING)
rpm: packages  ## build dist/snatd-*.rpm and snatd-legacy-*.rpm of the last commit (RPM_FOR="el9 fc43")
	@set -e; for one in $(RPM_FOR); do \
	  packaging/rpm/build dist $$one; \
	  [ $$one = el10 ] || packaging/rpm/build-legacy dist $$one; \
	done

test-system: PACKAGES += $(SYSTEM)
test-system: packages venv  ## the packages on a booted systemd, Debian 12 and 13; needs root
	@$(BIN)/python -m pytest tests/system

test-docker: PACKAGES += mmdebstrap zstd
test-docker: packages venv  ## beside real Docker of Debian 12, 13 and the next; needs root
	@$(BIN)/python -m pytest tests/docker

test-others: PACKAGES += $(SYSTEM)
test-others: packages venv  ## beside podman, CNI plugins, firewalld and kube-proxy's rules; needs root
	@$(BIN)/python -m pytest tests/others

test-matrix: PACKAGES += mmdebstrap zstd
test-matrix: packages venv  ## the tests on three Debians and with the newest libraries, and the README's table; needs root
	@$(BIN)/python -m tests.matrix

$(BIN)/.fuzz: $(BIN)/.complete
	@$(BIN)/pip install -qq --disable-pip-version-check --editable '.[fuzz]'
	@touch $@

fuzz: venv $(BIN)/.fuzz  ## every parser, led by coverage; FUZZ_S seconds each (default 25)
	@$(BIN)/python -m tests.fuzz

soak: venv  ## three rivals at once; SOAK_MUTATIONS (default 100,000; with SOAK=1 half a million); needs root
	@$(BIN)/python -m pytest -s tests/soak

bench: $(BIN)/.complete  ## measure, and print a table (BENCH="--quick", "--json FILE", "--compare FILE")
	@$(BIN)/python -m tests.bench $(BENCH)

manual: venv  ## bring the lists in the man pages up to date with the README and the code
	@$(BIN)/python -m docs.manual

pictures: venv  ## draw docs/demo.svg and docs/status.svg anew, from a real run
	@$(BIN)/python -m docs.pictures

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .fuzz
