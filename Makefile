# Two commands are all a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-dev
# Without the long ones: drawn schedules and fuzzing.
SECAGG_TESTS := $(patsubst %,tests/shared/test_%.py,agreement secagg_adversary secagg_encoding \
	secagg_layout secagg_protocol shamir)
# One thread a process: on small machines a second thread contends more than it helps.
export OMP_NUM_THREADS = 1
export OMP_WAIT_POLICY = PASSIVE
# glibc keeps freed memory instead of returning it after every layer: 10 % faster training steps.
export MALLOC_MMAP_THRESHOLD_ = 1000000000
export MALLOC_TRIM_THRESHOLD_ = 1000000000

.PHONY: demo demo-generator test coverage check install clean

demo: install ## Four virtual hospitals fine-tune CardioMM privately, and some die on the way.
	$(BIN)/fedcmr simulate run --sites 4 --rounds 3 --drop cedar:2 --drop birch:3 --drop dogwood:3:consistency

demo-generator: install ## Three virtual hospitals fine-tune a generator of hearts and look for copied patients.
	$(BIN)/fedcmr simulate run --sites 3 --config simulations/fedcmr_simulations/jobs/demo-generator.yaml

test: install check ## Everything that CI runs.
	$(BIN)/pytest -n 2 --dist worksteal
	$(MAKE) coverage

coverage: install ## Fails unless the tests of the secure aggregation run each of its branches.
	$(BIN)/coverage run -m pytest $(SECAGG_TESTS)
	$(BIN)/coverage report

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
