#!/usr/bin/env bash
# The shipped adapters for documents and code, trained on rows whose licence allows it, small enough for the checkout (r=8).
#   bash runs/shipped.sh SROIE RECEIPTS MBPP LARGE OUT
# SROIE (CC-BY-4.0) and GPT-4o's answers about other receipts (CC-BY-4.0, MIT): all of them, so no receipt of SROIE is left to
# test on; runs/idp.sh measures the recipe. MBPP's own solutions (CC-BY-4.0), those of LARGE under MIT, our tasks, and
# what passes of the student's own samples; MBPP's last 200 problems are held out and evaluated, beside HumanEval.
set -euo pipefail
cd "$(dirname "$0")/.."; source runs/jobs.sh
sroie=$1 receipts=$2 mbpp=$3 large=$4 out=$5; mkdir -p "$out"
tasks=data/codegen_tasks.jsonl
head -n -200 "$mbpp" > "$out/train.jsonl"; tail -n 200 "$mbpp" > "$out/held.jsonl"
python - "$large" "$out/mit.jsonl" <<'PY'
import gzip, json, sys
with (gzip.open if sys.argv[1].endswith(".gz") else open)(sys.argv[1], "rt", encoding="utf-8") as source:
    rows = [line for line in source if (row := json.loads(line))["licence"] == "MIT" and row.get("test_list")]
open(sys.argv[2], "w", encoding="utf-8").writelines(rows)
PY
idp() {
  python idp_prepare.py --src "$sroie" "$receipts" --schema data/sroie_schema.json --val_frac 0 --copies 3 --repeat_gold 2 \
    --outdir "$out/idp-data"
  python kd_train.py --student smollm2-135m --data "$out/idp-data/idp_kd.jsonl" --save_dir "$out/smollm2_idp" --lora_r 8 \
    --max_len 1400 --batch_size 32 --lr 2e-3 --max_steps 450
}
codegen() {  # NAME SAMPLES...: prepare with what passes of the samples, train
  python codegen_prepare.py --corpus $tasks "$out/train.jsonl" "$out/mit.jsonl" --exclude "$out/held.jsonl" --rejected 0 \
    --out_dir "$out/$1-data" ${2:+--samples "${@:2}"}
  python sft_train.py --student smollm2-135m --data "$out/$1-data/codegen_sft.jsonl" --save_dir "$out/$1" --lora_r 8 \
    --eval_steps 1000 --lr 1e-3 --epochs 4 --batch_size 32
}
sample() {  # CORPUS NAME: 16 samples of each task
  python infer_codegen.py --model_dir "$out/first" --input "$1" --output "$out/$2" --n 16 --temperature 0.8 \
    --max_new_tokens 256 --batch_size 256
}
job "$out/idp.log" idp
job "$out/first.log" codegen first
finish
job "$out/sample-own.log" sample $tasks samples-own.jsonl
job "$out/sample-mbpp.log" sample "$out/train.jsonl" samples-mbpp.jsonl
finish
job "$out/codegen.log" codegen smollm2_codegen "$out"/samples-{own,mbpp}.jsonl
finish
for name in first smollm2_codegen; do
  for set in humaneval mbpp; do
    more=(); [ $set = humaneval ] || more=(--problems "$out/held.jsonl")
    job "$out/eval-$name-$set.log" python eval_codegen.py --model_dir "$out/$name" --n 10 --k 1 10 --max_new_tokens 256 \
      --batch_size 256 --out_dir "$out/eval-$name-$set" "${more[@]}"
  done
done; finish
for name in first smollm2_codegen; do
  for set in humaneval mbpp; do echo "== $name, $set"; grep -E 'pass@|direct' "$out/eval-$name-$set.log"; done
done
