#!/usr/bin/env bash
# IDP from a large model: gold alone, the model's answers alone, and both, on the embedded student. Tested on SROIE's gold by
# company in two halves, so that each receipt is tested once by a model that saw neither its company's gold nor the large
# model's answers about it (idp_prepare.py states the rule).
#   bash runs/idp.sh SROIE TEACHER OUT     JSONL of {"document", "gold"} and of {"document", "teacher"}; not shipped
#   SYSTEMS="both sft sft-slow teacher base" and SEEDS="42 43 44" (of "both") say what is trained and evaluated.
set -euo pipefail
cd "$(dirname "$0")/.."; source runs/jobs.sh
sroie=$1 teacher=$2 out=$3
schema=data/sroie_schema.json
prepare() {  # NAME START FLAG...
  python idp_prepare.py --src "$sroie" ${4:+"$4"} --schema $schema --outdir "$out/data-$1-$2" --val_frac 0.5 --val_start "$2" $3
}
train() {  # NAME START ROUTE FLAG...
  python "$3_train.py" --student smollm2-135m --data "$out/data-$1-$2/idp_$3.jsonl" --save_dir "$out/$5-$2" --max_len 1400 \
    --batch_size 32 --lr 2e-3 $4 "${@:6}"
}
for half in 0 0.5; do
  job "$out/prepare-gold-$half.log" prepare gold $half "--copies 6"
  job "$out/prepare-teacher-$half.log" prepare teacher $half "--copies 3 --repeat_gold 0" "$teacher"
  job "$out/prepare-both-$half.log" prepare both $half "--copies 3 --repeat_gold 2" "$teacher"
done; finish
names=()
for system in ${SYSTEMS:-both sft sft-slow teacher base}; do
  for half in 0 0.5; do
    case $system in
      both) for seed in ${SEEDS:-42 43 44}; do
          names+=("$out/both-$seed-$half")
          job "$out/both-$seed-$half.log" train both $half kd "--max_steps 450" both-$seed --seed $seed
        done ;;
      sft) job "$out/sft-$half.log" train gold $half sft "--max_steps 240" sft ;;
      sft-slow) job "$out/sft-slow-$half.log" train gold $half sft "--max_steps 240 --lr 1e-3 --batch_size 8" sft-slow ;;
      teacher) job "$out/teacher-$half.log" train teacher $half kd "--max_steps 450" teacher ;;
    esac
    [ $system = both ] || names+=("$out/$system-$half")
  done
done; finish
for name in "${names[@]}"; do
  half=${name##*-} own=$out/report-$(basename "$name")
  model=$name; [[ $name != */base-* ]] || model=smollm2-135m
  job "$own.log" python eval_idp.py --model_dir "$model" --data "$sroie" --schema $schema --val_frac 0.5 --val_start "$half" \
    --max_new_tokens 160 --batch_size 64 --out "$own"
done; finish
python - "$out" "$sroie" <<'PY'  # both halves together: each receipt once, intervals over companies
import json, re, sys
from pathlib import Path
from eval_idp import summarise, table
from distill.tasks.idp_score import regex_receipt
out, systems = Path(sys.argv[1]), {}
for report in sorted(out.glob("report-*-0")):
    name, rows = report.name.removeprefix("report-").removesuffix("-0"), []
    for half in ("0", "0.5"):
        (lines,) = (out / f"report-{name}-{half}").glob("*_constrained.jsonl")
        rows += [json.loads(line) for line in lines.read_text("utf-8").splitlines()]
    gold = [r["gold"] for r in rows]
    groups = [re.sub(r"\W+", "", str(g["company"])).upper() for g in gold]
    systems[name] = summarise(rows, gold, groups)
documents = {json.dumps(json.loads(x)["gold"], sort_keys=True): json.loads(x)["document"] for x in open(sys.argv[2])}
regex = [{"value": regex_receipt(documents[json.dumps(g, sort_keys=True)]), "valid": True} for g in gold]
systems = {"regular expressions": summarise(regex, gold, groups), **systems}
(out / "pooled.json").write_text(json.dumps(systems, indent=1))
print(table({"systems": systems}))
PY
