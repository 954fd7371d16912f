# make demo                          stock and patched Whisper on a clip of the Gettysburg Address
# make demo AUDIO=file MODEL=name    on your own recording, with tiny.en, base, a folder, or a Hugging Face hub name
# make test                          lint, then the tests; ARGS="-k parity" goes to pytest
#
# Both make .venv first and install the tested set of constraints.txt in it. PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint checkpoints clean

demo: .venv/.demo
	$(BIN)/python -m whisper_static_cache demo $(if $(AUDIO),--audio "$(AUDIO)") $(if $(MODEL),--model "$(MODEL)")

test: lint checkpoints
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: .venv/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# The tests that need a checkpoint skip, and say so, where it cannot be fetched.
checkpoints: .venv/.test
	@$(BIN)/python -m whisper_static_cache fetch || echo "Without the checkpoints: tests that need them will be skipped."

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is missing or older than 3.10: name a newer one, as in make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.demo: .venv/.python setup.py pyproject.toml constraints.txt
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[demo]'
	@touch $@

.venv/.test: .venv/.demo
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[demo,dev,quantize]'
	@touch $@

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
