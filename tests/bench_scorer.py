"""What a scored prompt costs against one plain prefill of the same prompt, in the same run, on the embedded student.

    python tests/bench_scorer.py            # or: make bench

Ratios only: they hold from machine to machine, seconds do not. Best of several rounds, the order changing.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import LabelScorer, Task, completion_ids, load_model, prompt_ids
from distill.files import ROOT

THREE = ("Good", "Standard", "Bad")
TWENTY = tuple(
    f"{a} {b} {c}" for a in ("very", "quite", "hardly", "not", "only") for b in ("good", "bad") for c in "xy"
)
ROWS, ROUNDS = 4, 5


def main():
    model, tokenizer = load_model("smollm2-135m", precision="fp32")
    task = Task.load(ROOT / "data" / "creditmix_task.json")
    text = "Occupation: Writer, Annual Income: 30022.71, Outstanding Debt: 1071.33, Credit Utilization Ratio: 32.96, "
    prompts = [task.prompt(f"Age: {30 + i}.0, {text}Payment Behaviour: x") for i in range(ROWS)]
    batch = tokenizer.pad(
        {"input_ids": prompt_ids(tokenizer, prompts)}, return_tensors="pt", padding=True, padding_side="right"
    )

    def prefill():
        with torch.inference_mode():
            model(**batch, logits_to_keep=1)

    def one_a_label(labels):
        def run():
            with torch.inference_mode():
                for prompt, ids in zip(prompts, prompt_ids(tokenizer, prompts), strict=True):
                    for answer in completion_ids(tokenizer, [prompt] * len(labels), labels):
                        model(torch.tensor([ids + answer[:-1]]), logits_to_keep=len(answer))

        return run

    runs = {"plain prefill": prefill}
    for labels in (THREE, TWENTY):
        packed, headed = (LabelScorer(model, tokenizer, labels, h) for h in ((), task.null_prompts()))
        name = f"{len(labels)} labels"
        runs[f"{name}, packed"] = lambda s=packed: s.score(prompts)
        runs[f"{name}, packed, cached head"] = lambda s=headed: s.score(prompts)
    runs["3 labels, one forward a label"] = one_a_label(THREE)
    best = dict.fromkeys(runs, float("inf"))
    for i in range(ROUNDS + 1):  # the first round warms up
        for name in (list(runs), list(runs)[::-1])[i % 2]:
            start = time.perf_counter()
            runs[name]()
            best[name] = min(best[name], time.perf_counter() - start) if i else best[name]
    sizes = {len(i) - 1 for i in completion_ids(tokenizer, ["x"] * 20, TWENTY)}
    print(
        f"{ROWS} prompts of {batch['input_ids'].shape[1]} tokens, twenty labels of {min(sizes)} to {max(sizes)} tokens"
    )
    for name, seconds in best.items():
        print(f"{name:34} {seconds / best['plain prefill']:5.2f}x")


if __name__ == "__main__":
    main()
