#!/usr/bin/env bash
# Two GPUs against one: samples/s of the three trainers at the same effective batch, and FSDP-QLoRA on a 3B shape.
# Usage: bash runs/two_gpus.sh OUT      (random weights in the shapes of Qwen2.5-1.5B and -3B; some 8 minutes)
set -uo pipefail
out=$1; mkdir -p "$out/data"
export OMP_NUM_THREADS=4 HF_HUB_OFFLINE=1 TQDM_MININTERVAL=20
python creditmix_prepare.py --src data/creditmix_dataset.json --outdir "$out/data" > "$out/prepare.log" || exit 1
for shape in 1.5b 3b; do python tests/random_model.py $shape "$out/$shape" & done
wait -n && wait -n || exit 1
measure() {  # NAME ROUTE LAUNCHER... -- FLAG...: its samples/s, seconds and peak from run.json, or the end of its log
  local name=$1 route=$2 launcher=(); shift 2
  while [ "$1" != -- ]; do launcher+=("$1"); shift; done; shift
  rm -rf "${out:?}/$name"
  if timeout 170 "${launcher[@]}" "${route}_train.py" --data "$out/data/creditmix_$route.jsonl" --dev_rows 8 \
      --eval_steps 1000 --save_dir "$out/$name" "$@" > "$out/$name.log" 2>&1; then
    python - "$out/$name/run.json" "$name" <<'PY'
import json, sys
r = json.load(open(sys.argv[1]))
print(f"{sys.argv[2]:12} {r['samples_per_s']:8.1f} samples/s {r['seconds']:6.1f} s, {r['steps']} steps, "
      f"{r['rows_at_once']} rows at once, peak {r['peak_gib']} GiB a GPU, loss {r['train_loss']:.4f}", flush=True)
PY
  else
    echo "$name failed:"; grep -v "it/s\|s/it" "$out/$name.log" | grep -m1 -A45 -e Traceback -e Error || tail -15 "$out/$name.log"
  fi
}
one() { measure "$1-one" "$1" env CUDA_VISIBLE_DEVICES="$2" python -- "${@:3}"; }
two() { measure "$1-two" "$1" accelerate launch --num_processes 2 --mixed_precision bf16 -- "${@:2}"; }
shape="--student $out/1.5b --precision bf16"
sft="$shape --batch_size 320 --micro_batch 160 --max_steps 64"
dpo="$shape --batch_size 256 --micro_batch 128 --max_steps 48"
one sft 0 $sft & one dpo 1 $dpo & wait
two sft $sft
two dpo $dpo
one kd 0 $sft
two kd $sft
measure fsdp-qlora sft accelerate launch --config_file data/fsdp_qlora.yaml -- \
  --student "$out/3b" --precision nf4 --batch_size 128 --micro_batch 64 --max_steps 4
