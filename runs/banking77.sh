#!/usr/bin/env bash
# A task of your own with many labels: the 77 intents of a bank's customers (BANKING77), from CSV to evaluation,
# with the defaults of a GPU and with a longer run.
#   bash runs/banking77.sh CSV OUT     CSV: the columns text and category, .gz too; not shipped (CC-BY-4.0, PolyAI)
set -euo pipefail
cd "$(dirname "$0")/.."; source runs/jobs.sh
csv=$1 out=$2; mkdir -p "$out"
python creditmix_prepare.py --src "$csv" --text_column text --label_column category --task "$out/banking77_task.json" --init_task \
  --val_frac 0.2 --outdir "$out/data"
train() {  # NAME FLAG...
  python sft_train.py --student smollm2-135m --data "$out/data/banking77_sft.jsonl" --save_dir "$out/$1" "${@:2}"
}
job "$out/defaults.log" train defaults
job "$out/longer.log" train longer --batch_size 32 --epochs 5
finish
python eval_creditmix.py --model_dir "$out/defaults" "$out/longer" --data "$csv" --task "$out/banking77_task.json" --val_frac 0.2 \
  --out "$out/report"
