#!/usr/bin/env bash
# A task of your own: movie reviews, labelled by GPT-3.5 and by people. SFT on the gold labels and KD on GPT-3.5's, for 200, 1,000 and
# all training rows, tested on held-out gold. And KD on GPT-3.5's labels made soft, with all rows, in two ways: by its confusion
# (how often people agree with each of its labels, on 200 training rows), and by folds (the mean of its label and of the
# probabilities of a student trained on the labels of the other two thirds).
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
from distill.files import write_jsonl
out = sys.argv[1]
teacher, before = json.load(open(f"{out}/teacher.json")), json.load(open(f"{out}/reviews_task.json"))["template"].removesuffix("{input}")
sft = [json.loads(line) for line in open(f"{out}/reviews_sft.jsonl")]
for n in (200, 1000, len(sft)):
    name = "all" if n == len(sft) else n
    kd = [{**r, "teacher_output": teacher[r["input"].removeprefix(before)]} for r in sft[:n]]
    kd = [{k: v for k, v in r.items() if k != "output"} for r in kd if r["teacher_output"]]
    for route, rows in (("sft", sft[:n]), ("kd", kd)):
        write_jsonl(f"{out}/reviews-{name}_{route}.jsonl", rows)
PY
train() {  # ROUTE ROWS NAME FLAG...
  python "$1_train.py" --student smollm2-135m --data "$out/reviews-$2_$1.jsonl" --task "$out/reviews_task.json" \
    --save_dir "$out/$3" --lr 1e-3 --batch_size 32 "${@:4}"
}
models=()
for n in 200 1000 all; do
  steps="--epochs 3"; [ $n = all ] || steps="--max_steps $((n == 200 ? 60 : 120))"
  for route in sft kd; do
    job "$out/$route-$n.log" train $route $n $route-$n $steps
    models+=("$out/$route-$n")
  done
done
python - "$out" <<'PY'  # three folds, and the labels softened by the teacher's confusion
import json, sys
from collections import Counter
from distill.files import write_jsonl
out, LABELS = sys.argv[1], ("positive", "negative")
rows = [json.loads(line) for line in open(f"{out}/reviews-all_kd.jsonl")]
before = json.load(open(f"{out}/reviews_task.json"))["template"].removesuffix("{input}")
for fold in range(3):
    write_jsonl(f"{out}/reviews-not{fold}_kd.jsonl", [r for i, r in enumerate(rows) if i % 3 != fold])
    left_out = [r | {"question": r["input"].removeprefix(before)} for r in rows[fold::3]]
    write_jsonl(f"{out}/fold{fold}.jsonl", left_out)
gold = {(r := json.loads(line))["input"]: r["output"] for line in open(f"{out}/reviews-200_sft.jsonl")}
seen = Counter((r["teacher_output"], gold[r["input"]]) for r in rows if r["input"] in gold)
def soft(label):  # one more row for each label, so that no probability is 0
    total = sum(seen[label, right] + 1 for right in LABELS)
    return {right: (seen[label, right] + 1) / total for right in LABELS}
probs = {label: soft(label) for label in LABELS}
print("people agree with GPT-3.5's labels:", {label: round(p[label], 3) for label, p in probs.items()})
write_jsonl(f"{out}/reviews-confusion_kd.jsonl", [r | {"teacher_probs": probs[r["teacher_output"]]} for r in rows])
PY
job "$out/kd-confusion.log" train kd confusion kd-confusion --epochs 3
for fold in 0 1 2; do job "$out/not$fold.log" train kd not$fold not$fold --epochs 3; done
finish
for fold in 0 1 2; do
  python infer_creditmix.py --model_dir "$out/not$fold" --input "$out/fold$fold.jsonl" --output "$out/said$fold.jsonl"
done
python - "$out" <<'PY'
import json, sys
from distill.files import write_jsonl
out = sys.argv[1]
said = [json.loads(line) for fold in range(3) for line in open(f"{out}/said{fold}.jsonl")]
def soft(row):
    return {label: (p + (label == row["teacher_output"])) / 2 for label, p in row["probabilities"].items()}
keep = ("input", "teacher_output", "group")
write_jsonl(f"{out}/reviews-folds_kd.jsonl", [{k: row[k] for k in keep} | {"teacher_probs": soft(row)} for row in said])
PY
job "$out/kd-folds.log" train kd folds kd-folds --epochs 3
finish
python eval_creditmix.py --model_dir smollm2-135m "${models[@]}" "$out"/kd-{confusion,folds} --data "$out/rows.json" \
  --task "$out/reviews_task.json" --fit_calibration --out "$out/report"
