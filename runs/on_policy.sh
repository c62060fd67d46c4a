#!/usr/bin/env bash
# On-policy against off-policy KD on CodeGen: the same prompts, steps and batch. The teacher is the embedded student with an
# adapter trained on the shipped tasks; off-policy KD learns its log-probs on the tasks' solutions, or on texts that it wrote.
#   bash runs/on_policy.sh OUT
#   STEPS=240 ROUNDS="4 12" SEEDS="42 43 44" BATCH=16 STUDENT=smollm2-135m: the defaults. JOBS=8 for a large GPU.
#   OFF="given teacher": off-policy KD on the tasks' solutions and on the teacher's texts
# What is measured: 64 prompts that no student trained on. Each student answers them four times at temperature 1, and the loss
# is that of its own answers, per token, both ways round; and the loss on the tasks' solutions.
set -euo pipefail
cd "$(dirname "$0")/.."; source runs/jobs.sh
out=$1; mkdir -p "$out"
student=${STUDENT:-smollm2-135m} steps=${STEPS:-240} batch=${BATCH:-16} max_len=${MAX_LEN:-512}
read -ra off <<< "${OFF:-given teacher}"; read -ra rounds <<< "${ROUNDS:-4 12}"; read -ra seeds <<< "${SEEDS:-42 43 44}"
kd() {  # NAME DATA SEED FLAG...
  python kd_train.py --student "$student" --teacher "$out/teacher" --data "$out/$2.jsonl" --save_dir "$out/$1-$3" --seed "$3" \
    --max_steps "$steps" --batch_size "$batch" --max_len "$max_len" --lr 1e-3 --max_vram_gb 8 "${@:4}"
}
measure() {  # NAME MODEL SEED: $out/loss-NAME-SEED.json
  python - "$out" "$1" "$2" "$3" "$student" "$max_len" <<'PY'
import sys
from functools import partial
from pathlib import Path
from distill.files import read_json, write_json
from distill.model.hub import base_config
from distill.train.data import KDRow, encode, read_training_rows
from distill.train.on_policy import policy_loss
from distill.train.student_samples import prompts_under, sample_student
from distill.train.teacher_topk import TopK
from distill.train.teachers import Teacher
from kd_train import class_log_probs, token_loss
name, model, seed, student = sys.argv[2:6]
out, max_len = Path(sys.argv[1]), int(sys.argv[6])
teacher, folder = Teacher(str(out / "teacher")), out / f"loss-{name}-{seed}"
forward = partial(token_loss, temperature=1.0, alpha=0.0)
def reverse(logits, target, ids, teacher):
    own = class_log_probs(logits.float(), ids)
    return (own.exp() * (own - teacher)).sum()
tokenizer = base_config(student)[2]
held, _ = read_training_rows(out / "held_kd.jsonl", KDRow, "teacher_output", None)
asked, _ = prompts_under(tokenizer, held, max_len)
own = sample_student(model, "auto", asked * 4, max_len, f"measured:{seed}", folder / "samples.jsonl")
given, _ = encode(tokenizer, held, max_len, "input", "teacher_output")
result = {"whole": sum(r["ended"] for r in own) / len(own), "tokens": sum(len(r["texts"][0][0]) - r["labels"].count(-100) for r in own) / len(own)}
for rows, losses in ((own, {"own": forward, "own_reverse": reverse}), (given, {"given": forward})):
    top_k = TopK(teacher, student, rows, 32, folder)
    result |= {key: policy_loss(model, "auto", rows, top_k, loss) for key, loss in losses.items()}
run = Path(model) / "run.json"
if run.is_file() and "rounds" in (record := read_json(run)):
    result["rounds"] = [r["loss"] for r in record["rounds"]]
write_json(out / f"loss-{name}-{seed}.json", result)
PY
}
job "$out/prepare.log" python codegen_prepare.py --rejected 0 --out_dir "$out"
finish
python - "$out" <<'PY'  # 64 tasks are held out; the rest with solutions, and without, for the teacher to write
import sys
from pathlib import Path
from distill.files import read_rows, write_jsonl
from distill.train.data import KDRow
from common import unit_hash
out = Path(sys.argv[1])
rows = sorted(read_rows(out / "codegen_kd.jsonl", KDRow), key=lambda r: unit_hash("held", r["group"]))
write_jsonl(out / "held_kd.jsonl", rows[:64])
write_jsonl(out / "given_kd.jsonl", rows[64:])
write_jsonl(out / "teacher_kd.jsonl", [{"input": r["input"], "group": r["group"]} for r in rows[64:]])
PY
job "$out/teacher.log" python sft_train.py --student "$student" --data "$out/codegen_sft.jsonl" --save_dir "$out/teacher" --lr 1e-3 \
  --batch_size 32 --max_len "$max_len" ${TEACHER_STEPS:+--max_steps "$TEACHER_STEPS"}
finish
for seed in "${seeds[@]}"; do
  for texts in "${off[@]}"; do job "$out/off-$texts-$seed.log" kd "off-$texts" "${texts}_kd" "$seed"; done
  [ "$seed" != "${seeds[0]}" ] || finish  # the teacher's texts are written once, for all seeds
  for n in "${rounds[@]}"; do job "$out/on-$n-$seed.log" kd "on-$n" teacher_kd "$seed" --on_policy "$n"; done
done; finish
for seed in "${seeds[@]}"; do
  job "$out/loss-base-$seed.log" measure base "$student" "$seed"
  for name in "${off[@]/#/off-}" "${rounds[@]/#/on-}"; do
    job "$out/loss-$name-$seed.log" measure "$name" "$out/$name-$seed" "$seed"
  done
done; finish
python - "$out" "$steps" "$batch" "${off[*]}" "${rounds[*]}" "${seeds[*]}" <<'PY'
import json, sys
from statistics import mean, stdev
out, steps, batch, (off, rounds, seeds) = sys.argv[1], *sys.argv[2:4], map(str.split, sys.argv[4:])
texts = {"given": "the tasks' solutions", "teacher": "the teacher's texts"}
names = {"base": "student, untrained"} | {f"off-{kind}": f"off-policy, {texts[kind]}" for kind in off}
names |= {f"on-{n}": f"on-policy, {n} rounds" for n in rounds}
def cell(values):
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
print(f"{steps} steps of {batch} rows, seeds {', '.join(seeds)}; loss per token, mean ± standard deviation over seeds")
print("| KD | own answers, KL(teacher, student) | own answers, KL(student, teacher) | solutions, KL(teacher, student) | answers whole | tokens |")
print("| --- | --- | --- | --- | --- | --- |")
for name, title in names.items():
    found = [json.load(open(f"{out}/loss-{name}-{seed}.json")) for seed in seeds]
    losses = [cell([r[key] for r in found]) for key in ("own", "own_reverse", "given")]
    print(f"| {title} | {' | '.join(losses)} | {mean(r['whole'] for r in found):.2f} | {mean(r['tokens'] for r in found):.0f} |")
for n in rounds:
    path = [json.load(open(f"{out}/loss-on-{n}-{seed}.json"))["rounds"] for seed in seeds]
    print(f"on-policy, {n} rounds, development prompts, by round: {', '.join(f'{mean(x):.3f}' for x in zip(*path))}")
PY
