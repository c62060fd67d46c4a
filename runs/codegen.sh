#!/usr/bin/env bash
# The README's CodeGen table on a GPU: the embedded student, each route trained, then sampled with the base.
# Usage: bash runs/codegen.sh MBPP OUT     MBPP: its training part as JSONL (not shipped)
# A small student leaves a large GPU idle, so models run side by side; on an 8 GB card run them one by one.
set -euo pipefail
mbpp=$1 out=$2
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
train() {  # ROUTE FLAG...
  local route=$1; shift
  python "${route}_train.py" --student smollm2-135m --data "$out/codegen_$route.jsonl" --save_dir "$out/codegen_$route" \
    --eval_steps 1000 "$@" > "$out/codegen_$route.log" 2>&1
}
python codegen_prepare.py --out_dir "$out"
train kd --lr 3e-4 --epochs 3 & kd=$!
train sft --lr 3e-4 --epochs 3
train dpo --lr 5e-5 --epochs 1 --init_adapter "$out/codegen_sft" --sft_weight 0.2
wait "$kd"
sample="--mode direct plan --n 10 --k 1 10 --max_new_tokens 256 --batch_size 500"
evaluate() {  # NAME FLAG...: the four models at once, some 15 GB each
  local name=$1 model pids=(); shift
  for model in smollm2-135m "$out"/codegen_{sft,kd,dpo}; do
    python eval_codegen.py --model_dir "$model" $sample --out_dir "$out/$name-$(basename "$model")" "$@" & pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid"; done
}
evaluate humaneval
evaluate mbpp --problems "$mbpp" --last 200
