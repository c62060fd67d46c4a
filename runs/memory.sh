#!/usr/bin/env bash
# What memory costs and saves on a GPU: the server under a cap, the allocator's segments, paging, layers in RAM.
# Usage: bash runs/memory.sh OUT      (random weights in the shape of Qwen2.5-3B; some 7 minutes)
set -uo pipefail
out=$1; mkdir -p "$out/data"
export OMP_NUM_THREADS=4 HF_HUB_OFFLINE=1 TQDM_MININTERVAL=20
python creditmix_prepare.py --src data/creditmix_dataset.json --outdir "$out/data" > "$out/prepare.log" || exit 1
python tests/random_model.py 3b "$out/3b" || exit 1
said() { echo "== $1"; shift; timeout 170 "$@" > "$out/log" 2>&1 || echo "failed: $?"; tr '\r' '\n' < "$out/log" | grep -v 'it/s\|Loading weights' | tail -"${lines:-9}"; }
for how in False True; do
  said "server, 3B in NF4 under 4 GiB, expandable segments $how" \
    env PYTORCH_ALLOC_CONF=expandable_segments:$how MAX_VRAM_GB=4 \
    python tests/bench_serve.py --base "$out/3b" --rows 1024 --rounds 1
done
said "server, embedded student" python tests/bench_serve.py --rows 1024 --rounds 1
lines=5
for how in True False; do
  said "SFT, 3B in NF4, 384 rows asked under 8 GiB, expandable segments $how" \
    env PYTORCH_ALLOC_CONF=expandable_segments:$how \
    python sft_train.py --student "$out/3b" --data "$out/data/creditmix_sft.jsonl" --precision nf4 --max_vram_gb 8 \
    --batch_size 384 --max_steps 8 --dev_rows 8 --eval_steps 1000 --save_dir "$out/sft-$how"
done
lines=40 said "paged optimizer or not, 3B in NF4, 160 rows" \
  python tests/bench_train.py --only 3b --routes sft --kinds ours --rows 160 --variants unpaged --steps 2
mkdir -p "$out/offload"
for folder in "" "$out/offload"; do
  lines=2 said "scorer, 3B in bf16${folder:+ under 4 GiB, the other layers in RAM}" env OFFLOAD_FOLDER="$folder" \
    python tests/offloaded.py "$out/3b" ${folder:+4}
done
