#!/usr/bin/env bash
# The README's IDP and CodeGen tables on a GPU: the embedded student, each route trained and evaluated, some minutes each.
# Usage: bash tests/gpu_tasks.sh SROIE MBPP OUT     SROIE: JSONL of document and gold; MBPP: its JSONL; neither is shipped
set -euo pipefail
sroie=$1 mbpp=$2 out=$3
export HF_HUB_OFFLINE=1
student="--student smollm2-135m --eval_steps 1000"

python idp_prepare.py --src "$sroie" --schema data/sroie_schema.json --outdir "$out" --val_frac 0.5 --copies 6
long="--max_len 1400 --batch_size 8"
python sft_train.py $student --data "$out/idp_sft.jsonl" --save_dir "$out/idp_sft" $long --lr 1e-3 --max_steps 240
python kd_train.py $student --data "$out/idp_kd.jsonl" --save_dir "$out/idp_kd" $long --lr 5e-4 --max_steps 240
python dpo_train.py $student --data "$out/idp_dpo.jsonl" --save_dir "$out/idp_dpo" $long --lr 2e-4 --max_steps 30 \
  --init_adapter "$out/idp_sft" --sft_weight 0.5
python eval_idp.py --model_dir smollm2-135m "$out"/idp_{sft,kd,dpo} --data "$sroie" --schema data/sroie_schema.json \
  --val_frac 0.5 --max_new_tokens 160 --batch_size 134 --out "$out/idp_report"

python codegen_prepare.py --out_dir "$out"
python sft_train.py $student --data "$out/codegen_sft.jsonl" --save_dir "$out/codegen_sft" --lr 3e-4 --epochs 3
python kd_train.py $student --data "$out/codegen_kd.jsonl" --save_dir "$out/codegen_kd" --lr 3e-4 --epochs 3
python dpo_train.py $student --data "$out/codegen_dpo.jsonl" --save_dir "$out/codegen_dpo" --lr 5e-5 --epochs 1 \
  --init_adapter "$out/codegen_sft" --sft_weight 0.2
sample="--mode direct plan --n 10 --k 1 10 --max_new_tokens 256 --batch_size 1000"
models="smollm2-135m $out/codegen_sft $out/codegen_kd $out/codegen_dpo"
python eval_codegen.py --model_dir $models $sample --out_dir "$out/humaneval"
python eval_codegen.py --model_dir $models $sample --out_dir "$out/mbpp" --problems "$mbpp" --last 200
