# Every target sets up what it needs, in .venv. Needs Python >= 3.11, make and a package index.
# Paths are relative: the checkout may stand below a directory with a space in its name.
#
# ARGS goes to the command:  make demo ARGS="--dsn postgresql://..."
#                            make test ARGS="-x tests/unit"
#                            make soak TIME=3600 SEED=1 LOOP=uvloop
#                            make matrix SESSION=oldest

PYTHON ?= python3
export PYTHON

RUN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)/python
PYTEST := -m pytest -p tests.support.no_skips --no-skips
# Most tests wait for a server or a timeout: more of them at once than there are cores. Not file by
# file: those with few tests that take long would come last, and most workers have nothing to do.
TOGETHER := -n 4 --dist worksteal

# Of "make soak": seconds, a number to choose by (a new one each time, which it prints), the loop.
TIME ?= 60
SEED ?=
LOOP ?= asyncio

# Per cent: of lines and branches together, as coverage counts, and of branches alone.
COVERAGE := 95
BRANCHES := import json, sys; totals = json.load(sys.stdin)["totals"]; \
	percent = 100 * totals["covered_branches"] / totals["num_branches"]; \
	print(f"branches alone: {percent:.2f} %"); \
	sys.exit(percent < int(sys.argv[1]))

.PHONY: help demo test check pages soak lint types matrix bench docs build verify dist clean

help:  ## say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

demo:  ## run the demo: an app that works, and the mistakes, beside the bare pool
	@scripts/venv demo
	@$(RUN) -m poolkeeper demo $(ARGS)

test:  ## run the whole suite on a real PostgreSQL, with coverage (95 % or it fails)
	@scripts/venv test
	@$(RUN) -m coverage erase
	$(RUN) -m coverage run $(PYTEST) $(TOGETHER) $(ARGS)
	@$(RUN) -m coverage combine --quiet
	@$(RUN) -m coverage report --skip-covered --precision=2 --fail-under=$(COVERAGE)
	@$(RUN) -m coverage json --quiet -o - | $(RUN) -c '$(BRANCHES)' $(COVERAGE)

check:  ## run the suite without coverage: faster, and fit for a part of it
	@scripts/venv test
	$(RUN) $(PYTEST) $(ARGS)

pages:  ## do what the pages say as their readers do, from the wheel alone; ONLY=fastapi for one
	@scripts/venv test
	$(RUN) -m tests.docs.pages $(ONLY)

soak:  ## all kinds of work and trouble at once, for TIME=60 s; nothing may be missing or left
	@scripts/venv test
	$(RUN) -m tests.soak --time $(TIME) --loop $(LOOP) $(if $(SEED),--seed $(SEED)) $(ARGS)

lint:  ## ruff: rules and format; what GitHub reads: schemas and permissions
	@scripts/venv lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(RUN) -m check_jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(RUN) -m check_jsonschema --builtin-schema vendor.readthedocs .readthedocs.yaml
	$(RUN) -m check_jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(RUN) -m check_jsonschema --builtin-schema vendor.github-issue-forms \
		.github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/idea.yml
	$(dir $(RUN))zizmor --offline --quiet .github

types:  ## mypy and pyright, both strict
	@scripts/venv types
	$(RUN) -m mypy
	$(RUN) -m pyright

matrix:  ## the suite on every Python there is, uvloop, debug mode, oldest dependencies
	@scripts/venv dev
	$(RUN) -m nox $(if $(SESSION),--session $(SESSION),--tags tests) $(ARGS)

bench:  ## benchmarks beside other pools, into docs/; SLOW=1 for outages too, ONLY=fastapi for a part
	@scripts/venv bench
	$(RUN) -m benchmarks $(if $(SLOW),--slow) $(if $(ONLY),--only $(ONLY)) $(ARGS)

docs:  ## the site, strict, into build/docs; python -m http.server -d build/docs shows it
	@scripts/venv docs
	$(RUN) -m sphinx -W --keep-going -E -q -b dirhtml docs build/docs

build:  ## wheel and sdist, into dist/; the wheel is built from the sdist
	@scripts/venv dist
	rm -rf dist
	$(RUN) -m build

verify:  ## try what is in dist/ as its users get it: contents, types, the demo; TAG=v1.2.3
	@scripts/venv dist
	@scripts/venv types
	$(RUN) scripts/verify.py $(if $(TAG),--tag $(TAG)) $(ARGS)

dist: build  ## build, then verify: what a release does
	@$(MAKE) verify

clean:  ## remove everything that was made
	rm -rf .venv .nox dist build .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
