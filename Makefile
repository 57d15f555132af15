# Everything happens in this folder: .venv, build, .real. The system stays as it is.

PREFIX ?= /usr/local
export PATH := $(CURDIR)/.venv/bin:$(PATH)
STUBS = $(subst /,.,$(patsubst src/%.pyi,%,$(wildcard src/vhost_airlock/*/*.pyi)))
IN_PARALLEL = --numprocesses auto --dist loadfile --no-loadscope-reorder
CHECKED = $(wildcard $(shell git ls-files --cached --others --exclude-standard \
    src tests bench fuzz pyproject.toml tools/stubtest.allow))

.PHONY: help develop built lint types test test-direct test-asan coverage stress fuzz package demo
.PHONY: dist deb install uninstall bench clean

help:                                   ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## */\1 /p' Makefile | \
	    while read -r target text; do printf '%-10s %s\n' "$$target" "$$text"; done

develop: .venv/ready built              ## .venv with the tools and the compiled package

built: .venv/build                      # the data plane, in place
	@echo "$$(date +%T) data plane: half a minute if all of it has to be compiled"
	@python setup.py --quiet build_ext --inplace

.venv/build: pyproject.toml tools/bootstrap tools/preflight
	@echo "$$(date +%T) .venv: 10 s for Cython and setuptools"
	@tools/bootstrap build
	@touch $@

.venv/package: .venv/build
	@tools/bootstrap package
	@touch $@

.venv/ready: .venv/package
	@echo "$$(date +%T) .venv: a minute for the tools of development"
	@tools/bootstrap dev
	@touch $@

lint: develop                           ## style, formatting, likely mistakes
	ruff check .
	ruff format --check .
	cython-lint src
	check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

types: develop                          ## annotations; stubs against compiled modules
	mypy src tests bench fuzz
	stubtest --ignore-unused-allowlist --allowlist tools/stubtest.allow $(STUBS)

.venv/checked: $(CHECKED)               # lint and types, if a source has changed
	@$(MAKE) lint types
	@touch $@

test:                                   ## everything, with real programs where possible
	@tools/phase $(if $(wildcard .venv/ready),0.5,2) "tools and package" $(MAKE) develop
	@tools/phase 0.5 "style and types" $(MAKE) .venv/checked
	@tools/phase $(if $(wildcard .real/root/ready),0,3) "real programs" \
	    tools/real-root --or-say-why
	@tools/phase $(if $(wildcard .real/debian-13/ready),0,3) "Debian 12 and 13" \
	    tools/release-roots --or-say-why
	@echo "$$(date +%T) tests: 9 min; those that measure time come last, alone"
	@pytest $(IN_PARALLEL)

test-direct: develop                    ## long tests without an airlock: what is theirs?
	pytest --direct -k direct tests/real

test-asan: develop                      ## the data plane under ASan and UBSan
	tools/test-asan $(IN_PARALLEL)

coverage: test-asan                     ## the same, and the lines that these tests reach
	tools/coverage

stress: develop                         ## property tests, races and endurance, at length
	HYPOTHESIS_PROFILE=stress pytest --timeout 7200 tests/property \
	    tests/proof/test_notifying.py tests/unit/test_peers_ring.py \
	    tests/unit/test_backend.py tests/unit/test_frontend.py \
	    tests/unit/test_races.py tests/unit/test_mutators.py \
	    tests/integration/test_endurance.py tests/integration/test_kills.py \
	    tests/integration/test_deaths.py \
	    tests/integration/test_recovery.py tests/real/test_recovery.py \
	    tests/proof/test_kills.py tests/real/test_fs.py tests/real/test_dpdk_guest.py \
	    tests/real/test_guest.py tests/real/test_net.py tests/install \
	    tests/real/test_swap.py \
	    tests/real/test_migration.py tests/real/test_migration_net.py \
	    tests/real/test_migration_passt.py \
	    tests/unit/test_dirty_log_races.py tests/integration/test_dirty_log_oracle.py \
	    tests/real/test_lifecycle.py

fuzz: develop                           ## parsers and rings, for hours
	tools/fuzz --seconds $(or $(FUZZ_SECONDS),3600)

package: dist                           ## sdist and wheel in dist; tried by a demo
	@tools/try-package

dist: .venv/package
	@echo "$$(date +%T) dist: half a minute"
	@tools/package

demo: built                             ## see the isolation work, in half a minute
	@echo "$$(date +%T) demo: 4 s"
	@PYTHONPATH=src python -m vhost_airlock demo

install: dist                           ## in PREFIX (/usr/local), or that below DESTDIR
	@tools/install $(PREFIX)

deb:                                    ## a Debian package for this release, in dist/deb
	@tools/deb

uninstall:                              ## removes all that make install made
	@tools/install --remove $(PREFIX)

bench: develop                          ## the airlock against a direct connection
	tools/real-root
	python -m bench.bench $(BENCH)

clean:                                  ## all that was made here, .real too
	rm -rf .venv .real build dist src/*.egg-info .hypothesis .*_cache
	find src tests \( -name '*.so' -o -name __pycache__ \) -exec rm -rf {} +
