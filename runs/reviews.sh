#!/usr/bin/env bash
# A task of your own: movie reviews, labelled by GPT-3.5 and by people. SFT on the gold labels and KD on GPT-3.5's, for 200, 1,000 and
# all training rows, tested on held-out gold.
#   bash runs/reviews.sh REVIEWS OUT     REVIEWS: JSONL of {"text", "gold", "teacher"}, .gz too; not shipped
set -euo pipefail
cd "$(dirname "$0")/.."; source runs/jobs.sh
reviews=$1 out=$2; mkdir -p "$out"
cat > "$out/reviews_task.json" <<'JSON'
{"name": "reviews", "labels": ["positive", "negative"], "null_inputs": ["", "N/A", "[MASK]"],
 "template": "Is this sentence from a movie review positive or negative? Answer with one word.\n\n{input}"}
JSON
python - "$reviews" "$out" <<'PY'
import gzip, json, sys
source, out = sys.argv[1:]
rows = [json.loads(line) for line in (gzip.open if source.endswith(".gz") else open)(source, "rt", encoding="utf-8")]
json.dump([{"question": r["text"], "answer": r["gold"]} for r in rows], open(f"{out}/rows.json", "w"))
json.dump({r["text"]: r["teacher"] for r in rows}, open(f"{out}/teacher.json", "w"))
PY
python creditmix_prepare.py --src "$out/rows.json" --task "$out/reviews_task.json" --outdir "$out"
python - "$out" <<'PY'  # the same training rows with the teacher's labels; where it gave none, no row
import json, sys
out = sys.argv[1]
teacher, before = json.load(open(f"{out}/teacher.json")), json.load(open(f"{out}/reviews_task.json"))["template"].removesuffix("{input}")
sft = [json.loads(line) for line in open(f"{out}/reviews_sft.jsonl")]
for n in (200, 1000, len(sft)):
    name = "all" if n == len(sft) else n
    kd = [{**r, "teacher_output": teacher[r["input"].removeprefix(before)]} for r in sft[:n]]
    kd = [{k: v for k, v in r.items() if k != "output"} for r in kd if r["teacher_output"]]
    for route, rows in (("sft", sft[:n]), ("kd", kd)):
        with open(f"{out}/reviews-{name}_{route}.jsonl", "w") as f:
            f.writelines(json.dumps(r) + "\n" for r in rows)
PY
models=()
for n in 200 1000 all; do
  steps="--epochs 3"; [ $n = all ] || steps="--max_steps $((n == 200 ? 60 : 120))"
  for route in sft kd; do
    job "$out/$route-$n.log" python ${route}_train.py --student smollm2-135m --data "$out/reviews-${n}_$route.jsonl" \
      --task "$out/reviews_task.json" --save_dir "$out/$route-$n" --lr 1e-3 --batch_size 32 $steps
    models+=("$out/$route-$n")
  done
done; finish
python eval_creditmix.py --model_dir smollm2-135m "${models[@]}" --data "$out/rows.json" --task "$out/reviews_task.json" \
  --fit_calibration --out "$out/report"
