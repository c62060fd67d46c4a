#!/usr/bin/env bash
# The README's IDP table on a GPU: the embedded student, each route trained, then evaluated with the base.
# Usage: bash runs/idp.sh SROIE OUT     SROIE: JSONL of document and gold (not shipped)
# A small student leaves a large GPU idle, so the routes train side by side; on an 8 GB card run them one by one.
set -euo pipefail
sroie=$1 out=$2
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
train() {  # ROUTE FLAG...
  local route=$1; shift
  python "${route}_train.py" --student smollm2-135m --data "$out/idp_$route.jsonl" --save_dir "$out/idp_$route" \
    --max_len 1400 --batch_size 8 --eval_steps 1000 "$@" > "$out/idp_$route.log" 2>&1
}
python idp_prepare.py --src "$sroie" --schema data/sroie_schema.json --outdir "$out" --val_frac 0.5 --copies 6
train kd --lr 5e-4 --max_steps 240 & kd=$!
train sft --lr 1e-3 --max_steps 240
train dpo --lr 5e-5 --max_steps 60 --init_adapter "$out/idp_sft"
wait "$kd"
python eval_idp.py --model_dir smollm2-135m "$out"/idp_{sft,kd,dpo} --data "$sroie" --schema data/sroie_schema.json \
  --val_frac 0.5 --max_new_tokens 160 --batch_size 174 --out "$out/idp_report"
