#!/usr/bin/env bash
# IDP from a large model: gold alone, the model's answers alone, and both, on the embedded student. Tested on SROIE's gold by
# company in two halves, so that each receipt is tested once by a model that saw neither its company's gold nor the large
# model's answers about it (idp_prepare.py states the rule).
#   bash runs/idp.sh SROIE TEACHER OUT     JSONL of {"document", "gold"} and of {"document", "teacher"}; not shipped
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
for half in 0 0.5; do
  for seed in ${SEEDS:-42 43 44}; do
    job "$out/both-$seed-$half.log" train both $half kd "--max_steps 450" both-$seed --seed $seed
  done
  job "$out/sft-$half.log" train gold $half sft "--max_steps 240" sft
  job "$out/sft-slow-$half.log" train gold $half sft "--max_steps 240 --lr 1e-3 --batch_size 8" sft-slow
  job "$out/teacher-$half.log" train teacher $half kd "--max_steps 450" teacher
done; finish
for half in 0 0.5; do
  for name in smollm2-135m "$out"/{sft,sft-slow,teacher,both-*}-$half; do
    [ -e "$name/adapter_config.json" ] || [ "$name" = smollm2-135m ] || continue
    own=$out/report-$(basename "$name" "-$half")-$half
    job "$own.log" python eval_idp.py --model_dir "$name" --data "$sroie" --schema $schema --val_frac 0.5 --val_start $half \
      --max_new_tokens 160 --batch_size 64 --out "$own"
  done
done; finish
python eval_idp.py --pool "$out"/report-*-0 --out "$out/pooled" 2>/dev/null || true
for report in "$out"/report-*/report.txt; do echo "== $report"; cat "$report"; done
