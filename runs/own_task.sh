#!/usr/bin/env bash
# A task of your own on a CPU, from CSV to evaluation: movie reviews (1,000 training rows), six easily confused intents of a bank's
# customers, one of them cut to 20 rows, and types of questions with a test file. The commands are those that creditmix_prepare.py prints.
#   bash runs/own_task.sh REVIEWS INTENTS OUT [QUESTIONS TEST]     REVIEWS: JSONL of {"text", "gold"}; INTENTS: BANKING77's CSV;
#   QUESTIONS, TEST: train_5500.label and TREC_10.label of TREC; .gz too. None of them is shipped.
set -euo pipefail
cd "$(dirname "$0")/.."; source runs/jobs.sh
reviews=$1 intents=$2 out=$3 questions=${4:-} test=${5:-}; mkdir -p "$out"
python - "$reviews" "$intents" "$out" "$questions" "$test" <<'PY'
import csv, gzip, json, sys
from hashlib import sha256
reviews, intents, out, *questions = sys.argv[1:]
def lines(path, encoding="utf-8"): return (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding=encoding)
def in_order(rows): return sorted(rows, key=lambda row: sha256(row[0].encode()).hexdigest())
def write(name, rows):
    with open(f"{out}/{name}.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("text", "label"), *rows])
write("reviews", in_order((r["text"], r["gold"]) for r in map(json.loads, lines(reviews)))[:1554])  # 1,000 for training
six = "card_arrival card_delivery_estimate lost_or_stolen_card card_not_working activate_my_card card_linking".split()
rows = in_order((r["text"], r["category"]) for r in csv.DictReader(lines(intents)) if r["category"] in six)
write("intents", [r for r in rows if r[1] != "card_linking"] + [r for r in rows if r[1] == "card_linking"][:20])
if all(questions):  # lines "DESC:manner How did ... ?"; a few of the test file's are among the others
    split = [[line.rstrip("\n").split(" ", 1) for line in lines(path, "latin-1")] for path in questions]
    rows, test = ([(text, kind.split(":")[0]) for kind, text in part] for part in split)
    write("questions", rows)
    write("questions_test", [row for row in test if row[0] not in dict(rows)])
PY
for name in reviews intents ${questions:+questions}; do
  held="--val_frac $([ $name = intents ] && echo 0.2 || echo 0.35)" test=$([ $name != questions ] || echo "--test $out/questions_test.csv")
  python creditmix_prepare.py --src "$out/$name.csv" --text_column text --label_column label --task "$out/${name}_task.json" --init_task \
    --outdir "$out" $held
  job "$out/$name.log" python sft_train.py --student smollm2-135m --data "$out/${name}_sft.jsonl" --save_dir "$out/${name}_sft"
  finish
  python eval_creditmix.py --model_dir "$out/${name}_sft" --data "$out/$name.csv" --task "$out/${name}_task.json" $held $test \
    --out "$out/report-$name"
done
