#!/usr/bin/env bash
# The quick start in one shell on one GPU under a cap of 8 GiB: prepare, SFT, evaluate, OFFLOAD_FOLDER, serve, KD, DPO, and
# three adapters served at last. A few steps each, on random weights in the shape of Qwen2.5-3B: memory, not quality.
#   bash runs/quickstart.sh OUT [GIB]
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1 gib=${2:-8}; mkdir -p "$out"
export OMP_NUM_THREADS=4 HF_HUB_OFFLINE=1 TQDM_MININTERVAL=20 MAX_VRAM_GB=$gib
serve() {  # wait until the server is ready, ask every model once, stop it
  PORT=8123 python -m uvicorn serve_creditmix:app --port 8123 > "$out/serve.log" 2>&1 & local server=$!
  for _ in $(seq 120); do
    sleep 1; curl -sf localhost:8123/readyz > "$out/ready.json" && break
    kill -0 $server || { tail -5 "$out/serve.log"; exit 1; }
  done
  cat "$out/ready.json"; echo
  for model in base "$@"; do
    curl -sf -X POST localhost:8123/infer/$model -H 'Content-Type: application/json' -d '{"features": "Age: 23.0"}' | cut -c1-90
    echo
  done
  curl -s localhost:8123/metrics | grep '^serve_gpu_peak_bytes'
  kill $server; wait $server || true
}
python tests/random_model.py 3b "$out/3b"
python creditmix_prepare.py --src data/creditmix_dataset.json --outdir "$out/data" | tail -1
export BASE_MODEL=$out/3b SFT_DIR=$out/sft KD_DIR=$out/kd DPO_DIR=$out/dpo
train="--student $BASE_MODEL --max_vram_gb $gib --max_steps 4 --eval_steps 4 --batch_size 32 --dev_rows 32 --lr 1e-3"
python sft_train.py $train --data "$out/data/creditmix_sft.jsonl" --save_dir "$out/sft" | tail -3
python eval_creditmix.py --model_dir "$BASE_MODEL" "$out/sft" --val_per_class 32 --out "$out/report" | tail -9
export OFFLOAD_FOLDER=$out/offload
serve sft
python kd_train.py $train --data "$out/data/creditmix_kd.jsonl" --save_dir "$out/kd" | tail -3
python dpo_train.py $train --data "$out/data/creditmix_dpo.jsonl" --save_dir "$out/dpo" --init_adapter "$out/sft" | tail -3
serve sft kd dpo
grep -h OFFLOAD "$out/serve.log"
