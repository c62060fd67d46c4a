#!/usr/bin/env bash
# The shipped adapters: SFT, KD and DPO trained on the synthetic twin alone, evaluated on held-out twin rows and on real ones.
#   bash runs/twin.sh REAL OUT     REAL: the Kaggle CSV (not shipped); the recipe is that of runs/creditmix.sh
set -euo pipefail
cd "$(dirname "$0")/.."; source runs/jobs.sh
real=$1 out=$2
CHOOSE=0 bash runs/creditmix.sh data/creditmix_dataset.json "$out" 42
job "$out/real.log" python eval_creditmix.py --model_dir smollm2-135m "$out"/{sft,kd,dpo}-42 --data "$real" \
  --val_per_class 1500 --out "$out/report-real"
finish
echo "== the same adapters on real rows"; cat "$out/report-real/report.txt"
