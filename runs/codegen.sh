#!/usr/bin/env bash
# CodeGen from large models, then from the student itself: the embedded student trained on our tasks, on the passing solutions of
# Qwen2.5-1.5B and GPT models, on its own passing samples (expert iteration), and by DPO on passing against failing samples.
#   bash runs/codegen.sh MBPP LARGE OUT     MBPP's training part and the large models' solutions as JSONL; neither is shipped
#   ROUNDS=2: of self-distillation; 0 leaves it and DPO out
# MBPP's last 200 problems are left out of everything that trains and are what is evaluated, beside HumanEval.
set -euo pipefail
cd "$(dirname "$0")/.."; source runs/jobs.sh
mbpp=$1 large=$2 out=$3; mkdir -p "$out"
head -n -200 "$mbpp" > "$out/train.jsonl"; tail -n 200 "$mbpp" > "$out/held.jsonl"
tasks=data/codegen_tasks.jsonl
train() {  # ROUTE DATA NAME FLAG...
  python "$1_train.py" --student smollm2-135m --data "$out/$2/codegen_$1.jsonl" --save_dir "$out/$3" --eval_steps 1000 "${@:4}"
}
sample() {  # MODEL CORPUS NAME: 16 samples of each task
  python infer_codegen.py --model_dir "$out/$1" --input "$2" --output "$out/$3" --n 16 --temperature 0.8 --max_new_tokens 256 \
    --batch_size 256
}
evaluate() {  # NAME MODEL
  for set in humaneval mbpp; do
    more=(); [ $set = humaneval ] || more=(--problems "$out/held.jsonl")
    job "$out/eval-$set-$1.log" python eval_codegen.py --model_dir "$2" --n 10 --k 1 10 --max_new_tokens 256 --batch_size 256 \
      --out_dir "$out/$set-$1" "${more[@]}"
  done
}
job "$out/prepare-own.log" python codegen_prepare.py --out_dir "$out/own" --exclude "$out/held.jsonl"
job "$out/prepare-large.log" python codegen_prepare.py --corpus $tasks "$out/train.jsonl" "$large" --exclude "$out/held.jsonl" \
  --rejected 0 --out_dir "$out/large"
finish
job "$out/own.log" train sft own own-sft --lr 1e-3 --epochs 3 --batch_size 32
job "$out/large.log" train sft large large-sft --lr 1e-3 --epochs 4 --batch_size 32
job "$out/large-2.log" train sft large large-fast --lr 2e-3 --epochs 6 --batch_size 64
finish
names=(own-sft large-sft large-fast)
for round in $(seq "${ROUNDS:-2}"); do  # verified self-distillation: the student trains on what passes of its own
  model=large-sft; [ $round = 1 ] || model=self-1
  job "$out/sample-$round-own.log" sample $model $tasks "samples-$round-own.jsonl"
  job "$out/sample-$round-mbpp.log" sample $model "$out/train.jsonl" "samples-$round-mbpp.jsonl"
  finish
  job "$out/prepare-self-$round.log" python codegen_prepare.py --corpus $tasks "$out/train.jsonl" "$large" \
    --exclude "$out/held.jsonl" --rejected 0 --samples "$out"/samples-*-{own,mbpp}.jsonl --out_dir "$out/self-data-$round"
  finish
  job "$out/self-$round.log" train sft "self-data-$round" "self-$round" --lr 1e-3 --epochs 4 --batch_size 32
  finish
  names+=("self-$round")
done
if [ "${ROUNDS:-2}" -gt 0 ]; then
  job "$out/dpo.log" train dpo "self-data-$round" self-dpo --lr 1e-4 --epochs 1 --batch_size 32 --sft_weight 0.2 \
    --init_adapter "$out/self-$round"
  finish
  names+=(self-dpo)
fi
evaluate base smollm2-135m
for name in "${names[@]}"; do evaluate "$name" "$out/$name"; done
finish
for set in humaneval mbpp; do
  echo "== $set"; cat "$out"/eval-$set-*.log | grep -E 'pass@|^[^ ]+ +direct' | sort -u || true
done
