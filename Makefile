# Everything happens in this folder: .venv, build, .real; the system stays as it is.

PY    := .venv/bin/python
STUBS  = $(subst /,.,$(patsubst src/%.pyi,%,$(wildcard src/vhost_airlock/dataplane/*.pyi)))

.PHONY: develop lint types test test-asan demo bench clean

develop: .venv/ready                    ## .venv with the tools and the compiled package
	$(PY) setup.py --quiet build_ext --inplace

.venv/ready: pyproject.toml tools/bootstrap
	tools/bootstrap

lint: develop                           ## style, formatting, likely mistakes
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m cython_lint src

types: develop                          ## annotations, and stubs against compiled modules
	$(PY) -m mypy src tests
	$(PY) -m mypy.stubtest --allowlist tools/stubtest.allow $(STUBS)

test: lint types                        ## everything; real programs where there are any
	$(PY) -m pytest

test-asan: develop                      ## the data plane under ASan and UBSan
	tools/test-asan

demo: develop                           ## see the isolation work, nothing else needed
	.venv/bin/vhost-airlock demo

bench: develop                          ## the airlock against a direct connection
	$(PY) bench/bench.py

clean:                                  ## all that was made here, .real too
	rm -rf .venv .real build dist src/*.egg-info .hypothesis .*_cache
	find src tests -name '*.so' -o -name __pycache__ -prune | xargs rm -rf
