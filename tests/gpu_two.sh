#!/usr/bin/env bash
# Two GPUs against one: samples/s of sft_train.py at the same effective batch, and FSDP-QLoRA on a 3B shape.
# Usage: bash tests/gpu_two.sh OUT      (random weights in the shapes of Qwen2.5-1.5B and -3B; under 5 minutes)
set -uo pipefail
out=$1; mkdir -p "$out/data"
export OMP_NUM_THREADS=4 HF_HUB_OFFLINE=1 TQDM_MININTERVAL=20
python creditmix_prepare.py --src data/creditmix_dataset.json --outdir "$out/data" > "$out/prepare.log" || exit 1
for shape in 1.5b 3b; do python tests/random_model.py $shape "$out/$shape" || exit 1; done
train="sft_train.py --data $out/data/creditmix_sft.jsonl --dev_rows 8 --eval_steps 1000"
measure() {  # NAME COMMAND...: its samples/s, seconds and peak from run.json, or the end of its log
  local name=$1; shift
  rm -rf "${out:?}/$name"
  if timeout 170 "$@" --save_dir "$out/$name" > "$out/$name.log" 2>&1; then
    python - "$out/$name/run.json" "$name" <<'PY'
import json, sys
r = json.load(open(sys.argv[1]))
print(f"{sys.argv[2]:12} {r['samples_per_s']:8.1f} samples/s {r['seconds']:6.1f} s, {r['steps']} steps, "
      f"{r['rows_at_once']} rows at once, peak {r['peak_gib']} GiB a GPU, loss {r['train_loss']:.4f}", flush=True)
PY
  else
    echo "$name failed:"; grep -v "it/s\|s/it" "$out/$name.log" | tail -15
  fi
}
shape="--student $out/1.5b --precision bf16 --batch_size 320 --micro_batch 160 --max_steps 24"
measure one python $train $shape
measure two accelerate launch --num_processes 2 --mixed_precision bf16 $train $shape
measure fsdp-qlora accelerate launch --config_file data/fsdp_qlora.yaml $train \
  --student "$out/3b" --precision nf4 --batch_size 128 --micro_batch 64 --max_steps 6
