#!/usr/bin/env bash
# The README's table on a GPU: SFT, KD and DPO on the embedded student for each seed, evaluated with base and references.
# Usage: bash tests/gpu_creditmix.sh SRC OUT [SEED ...]     SRC: the Kaggle CSV, or data/creditmix_dataset.json
# A small student leaves a large GPU idle, so the routes train side by side; on an 8 GB card run them one by one.
set -euo pipefail
src=$1 out=$2; shift 2
export OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1
rate="--lr 1e-3 --batch_size 32 --max_steps 640 --eval_steps 128"
for seed in "${@:-42}"; do
  data=$out/data-$seed; mkdir -p "$data"
  python creditmix_prepare.py --src "$src" --outdir "$data" --seed "$seed" > "$data/prepare.log"
  for route in sft kd dpo; do
    extra=""; [ $route != dpo ] || extra="--beta 0.3 --sft_weight 1"
    python ${route}_train.py --student smollm2-135m --data "$data/creditmix_$route.jsonl" --seed "$seed" \
      --save_dir "$out/$route-$seed" $rate $extra > "$out/$route-$seed.log" 2>&1 &
  done
done
wait
for seed in "${@:-42}"; do
  python eval_creditmix.py --model_dir smollm2-135m "$out"/{sft,kd,dpo}-"$seed" --data "$src" --val_per_class 1500 \
    --seed "$seed" --fit_calibration --out "$out/report-$seed" &
done
wait
