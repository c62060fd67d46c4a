#!/usr/bin/env bash
# The defaults of --lr and --batch_size: learning rates for each task and length of run, compared on development rows.
#   bash runs/defaults.sh REVIEWS OUT     REVIEWS: JSONL of {"text", "gold"}, .gz too; not shipped ("" leaves them out)
#   TASKS, RUNS, LRS, SEEDS and STUDENT say what is compared. A run that has finished is kept, so the same command goes on.
#   JOBS=8 ... runs eight jobs at once on a large GPU; the default is one, for an 8 GB card.
set -euo pipefail
cd "$(dirname "$0")/.."; source runs/jobs.sh
reviews=$1 out=$2 student=${STUDENT:-smollm2-135m}; mkdir -p "$out"
tasks=${TASKS-creditmix-sft creditmix-kd idp-sft codegen-sft ${reviews:+reviews-sft}}
declare -A flags=(
  [short]="--max_steps 200 --batch_size 8" [long]="--epochs 3 --batch_size 16" [wide]="--epochs 3 --batch_size 32"
)
train() {  # TASK RUN LR SEED
  local folder="$out/$1/$2/$3/$4" route=${1#*-} task=${1%-*}
  if grep -qs '"status": "finished"' "$folder/run.json"; then return; fi
  rm -rf "$folder"
  python "${route}_train.py" --student "$student" --data "$out/data/${task}_$route.jsonl" --save_dir "$folder" --lr "$3" \
    --seed "$4" --max_len 1200 --dev_rows 500 ${flags[$2]}
}
prepare_reviews() {
  python - "$reviews" "$out" <<'PY'
import gzip, json, sys
source, out = sys.argv[1:]
rows = [json.loads(line) for line in (gzip.open if source.endswith(".gz") else open)(source, "rt", encoding="utf-8")]
json.dump([{"question": r["text"], "answer": r["gold"]} for r in rows], open(f"{out}/reviews.json", "w"))
task = {"name": "reviews", "labels": ["positive", "negative"], "null_inputs": ["", "N/A", "[MASK]"]}
task["template"] = "Is this sentence from a movie review positive or negative? Answer with one word.\n\n{input}"
json.dump(task, open(f"{out}/reviews_task.json", "w"))
PY
  python creditmix_prepare.py --src "$out/reviews.json" --task "$out/reviews_task.json" --outdir "$out/data"
}
job "$out/creditmix.log" python creditmix_prepare.py --src data/creditmix_dataset.json --outdir "$out/data"
job "$out/idp.log" python idp_prepare.py --src data/idp_corpus.jsonl --schema data/idp_schema.json --outdir "$out/data"
job "$out/codegen.log" python codegen_prepare.py --out_dir "$out/data"
[ -z "$reviews" ] || job "$out/reviews.log" prepare_reviews
finish
for run in ${RUNS:-short long wide}; do
  for task in $tasks; do
    for seed in ${SEEDS:-42}; do
      for lr in ${LRS:-2e-4 5e-4 1e-3 2e-3}; do
        job "$out/logs/$task-$run-$lr-$seed.log" train "$task" "$run" "$lr" "$seed"
      done
    done
  done
done
finish || echo "what failed is not in the table" >&2
python - "$out" <<'PY' | tee "$out/defaults.txt"
import json, sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
found, loss = defaultdict(list), {}
for path in Path(sys.argv[1]).glob("*/*/*/*/run.json"):
    task, run, lr, _ = path.parts[-5:-1]
    record = json.loads(path.read_text("utf-8"))
    if record["status"] == "finished":
        found[task, run, float(lr)].append(record)
print("task          run       lr  steps  batch  seconds  seeds  development loss  accuracy")
for (task, run, lr), records in sorted(found.items()):
    # of text, the share of tokens that greedy decoding gets wrong: what chooses the checkpoint
    loss[task, run, lr] = mean(1 - r["best"] if "accuracy" in r["best_metric"] else r["best"] for r in records)
    accuracy = f" {mean(r['dev']['accuracy'] for r in records):9.3f}" if "dev" in records[0] else ""
    steps, batch, seconds = records[0]["steps"], records[0]["args"]["batch_size"], mean(r["seconds"] for r in records)
    print(f"{task:13} {run:5} {lr:6g} {steps:6} {batch:6} {seconds:8.0f} {len(records):6}", end="")
    print(f" {loss[task, run, lr]:17.4f}{accuracy}")
print("\nrun       lr  loss above the task's best rate, mean over tasks")
for run, lr in sorted({key[1:] for key in loss}):
    tasks = [task for task, *key in loss if key == [run, lr]]
    above = mean(loss[t, run, lr] / min(v for (u, r, _), v in loss.items() if (u, r) == (t, run)) - 1 for t in tasks)
    print(f"{run:5} {lr:6g} {above:18.1%} of {len(tasks)} tasks")
PY
