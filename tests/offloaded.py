"""Label scores of a model whose layers do not all fit the GPU: rows/s, peak, and the first scores to compare by eye.

OFFLOAD_FOLDER=/tmp/offload python tests/offloaded.py runs/random-3b 4     # GiB; without both, all on the GPU
"""

import sys
import time

import torch
from serving import ROOT, rows

sys.path.insert(0, str(ROOT))
from common import LabelScorer, Task, load_model


def main(folder, gib=None):
    task = Task.load(ROOT / "data" / "creditmix_task.json")
    model, tokenizer = load_model(folder, "bf16", max_vram_gb=gib and float(gib))
    scorer = LabelScorer(model, tokenizer, task.labels, task.null_prompts())
    prompts = [task.prompt(text) for text in rows(256)]
    found = scorer.score(prompts[:32])
    start = time.perf_counter()
    scorer.score(prompts)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0
    print(f"{len(prompts) / seconds:.1f} rows/s, peak {peak:.2f} GiB, token trees: {scorer.forward.trees}")
    print(found[:2].round(3).tolist(), found.mean(0).round(3).tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])
