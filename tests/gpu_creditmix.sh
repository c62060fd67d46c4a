#!/usr/bin/env bash
# CreditMix on a GPU: SFT, KD and DPO on the embedded student for each seed, evaluated with base and references.
# Usage: bash tests/gpu_creditmix.sh SRC OUT [SEED ...]     SRC: the Kaggle CSV, or data/creditmix_dataset.json
# A small student leaves a large GPU idle, so the routes train side by side; on an 8 GB card run them one by one.
set -euo pipefail
src=$1 out=$2; shift 2
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
train() {  # ROUTE SEED FLAG...
  local route=$1 seed=$2; shift 2
  python "${route}_train.py" --student smollm2-135m --data "$out/data-$seed/creditmix_$route.jsonl" --seed "$seed" \
    --save_dir "$out/$route-$seed" "$@" > "$out/$route-$seed.log" 2>&1
}
pids=()
for seed in "${@:-42}"; do
  mkdir -p "$out/data-$seed"
  python creditmix_prepare.py --src "$src" --outdir "$out/data-$seed" --seed "$seed" > "$out/data-$seed/prepare.log"
  { train sft "$seed" --lr 2e-3 --batch_size 64 --max_steps 560 --eval_steps 140 --swap_noise 0.7 &&
    train dpo "$seed" --lr 2e-4 --batch_size 32 --max_steps 96 --eval_steps 32 --swap_noise 0.7 --init_adapter "$out/sft-$seed"
  } & pids+=($!)
  train kd "$seed" --lr 1e-3 --batch_size 32 --max_steps 560 --eval_steps 140 & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done  # a bare wait would pass over a run that failed
pids=()
for seed in "${@:-42}"; do
  python eval_creditmix.py --model_dir smollm2-135m "$out"/{sft,kd,dpo}-"$seed" --data "$src" --val_per_class 1500 \
    --seed "$seed" --fit_calibration --out "$out/report-$seed" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
