"""What label scores cost: against one plain prefill of the same prompts; in bf16 on a CPU; with CUDA graphs on a GPU.

    python tests/bench_scorer.py            # or: make bench; the embedded student
    python tests/random_model.py 3b runs/random-3b
    python tests/bench_scorer.py --model_dir runs/random-3b --precisions nf4 bf16       # GPU: the passes of a server

The first table is of ratios: they hold from machine to machine, seconds do not. Best of several rounds, the order
changing. The second one has three random adapters on the model and rows of all of them in a pass.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from scipy.special import softmax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from random_model import with_adapters

from common import Calibration, LabelScorer, Task, completion_ids, load_model, prompt_ids
from distill.files import ROOT, cli, read_json
from distill.hardware import choose_precision
from distill.model.hub import EMBEDDED, base_config

THREE = ("Good", "Standard", "Bad")
TWENTY = tuple(
    f"{a} {b} {c}" for a in ("very", "quite", "hardly", "not", "only") for b in ("good", "bad") for c in "xy"
)
TEXT = "Occupation: Writer, Annual Income: 30022.71, Outstanding Debt: 1071.33, Credit Utilization Ratio: 32.96, "
ROWS, ROUNDS = 4, 5
PASSES, REPEATS, OFFLINE = (1, 4, 16, 32, 64, 128), 15, 1000  # rows of a pass, times of each, rows scored offline


def compare_with_prefill(model, tokenizer, task):
    """Print how long scores of a few prompts take, as multiples of their prefill."""
    prompts = [task.prompt(f"Age: {30 + i}.0, {TEXT}Payment Behaviour: x") for i in range(ROWS)]
    batch = tokenizer.pad(
        {"input_ids": prompt_ids(tokenizer, prompts)}, return_tensors="pt", padding=True, padding_side="right"
    ).to(model.device)

    def prefill():
        with torch.inference_mode():
            model(**batch, logits_to_keep=1).logits.cpu()

    def one_a_label(labels):
        def run():
            with torch.inference_mode():
                for prompt, ids in zip(prompts, prompt_ids(tokenizer, prompts), strict=True):
                    for answer in completion_ids(tokenizer, [prompt] * len(labels), labels):
                        ids_and_answer = torch.tensor([ids + answer[:-1]], device=model.device)
                        model(ids_and_answer, logits_to_keep=len(answer)).logits.cpu()

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


def compare_precisions(task):
    """Print how fast a CPU scores rows with the shipped adapter in bf16 and in fp32, and how far the answers differ."""
    folder, found, speed = ROOT / "runs" / "smollm2_sft", {}, {}
    calibration, rows = Calibration.load(folder, task), read_json(ROOT / "data" / "creditmix_dataset.json")[:1600:50]
    prompts = [task.prompt(row["question"]) for row in rows]
    for precision in ("fp32", "bf16"):
        scorer = LabelScorer(*load_model(folder, precision), task.labels, task.null_prompts())
        prior, seconds = scorer.prior(task), []
        for _ in range(2):
            start = time.thread_time()  # the CPU's other work does not count
            raw = scorer.score(prompts)
            seconds.append(time.thread_time() - start)
        found[precision], speed[precision] = softmax(calibration(raw, prior), 1), len(rows) / min(seconds)
    apart, same = (found["bf16"] - found["fp32"]), found["bf16"].argmax(1) == found["fp32"].argmax(1)
    chosen, why = choose_precision(base_config(EMBEDDED)[1])
    print(
        f"\nbf16 {speed['bf16']:.1f} rows/s, fp32 {speed['fp32']:.1f}: {speed['bf16'] / speed['fp32']:.2f}x; the same "
        f"label on {same.sum()} of {len(rows)} rows, probabilities within {abs(apart).max():.3f}\n"
        f"--precision auto: {chosen} ({why})"
    )


def compare_with_graphs(name, precision, task):
    """Print what passes of some sizes take launched kernel by kernel and replayed, and scoring many rows."""
    torch.cuda.reset_peak_memory_stats()
    model, tokenizer = load_model(name, precision)
    model = with_adapters(model, 3)
    adapters = [*model.peft_config]
    texts = [task.prompt(f"Age: {18 + i % 60}.0, {TEXT}Payment Behaviour: {'x' * (i % 9)}") for i in range(OFFLINE)]
    ids = prompt_ids(tokenizer, texts)
    own = [adapters[i % 3] for i in range(OFFLINE)]
    eager, graphs = (LabelScorer(model, tokenizer, task.labels, task.null_prompts()) for _ in range(2))
    eager.forward.graphs.enabled = False
    memory = []
    for scorer in (eager, graphs):
        scorer.score_ids(ids, own)
        memory.append(torch.cuda.max_memory_reserved() / 2**30)
    start = time.perf_counter()
    recorded = graphs.forward.record(min(map(len, ids)), max(map(len, ids)), adapters, seconds=300)
    took = time.perf_counter() - start
    memory.append(torch.cuda.max_memory_reserved() / 2**30)
    prefix = len(graphs.forward.prefix)
    print(
        f"\n{name}, {model.get_base_model().precision}, 3 adapters, prompts of {min(map(len, ids))} to "
        f"{max(map(len, ids))} tokens of which {prefix} are cached, {torch.cuda.get_device_name()}\n"
        f"{recorded} passes recorded in {took:.1f} s; peak {memory[1]:.2f} GiB without them, {memory[2]:.2f} with them"
    )
    print(f"{'rows a pass':>12}{'eager ms':>10}{'graph ms':>10}{'ratio':>8}{'difference':>12}")
    for rows in PASSES:
        times, found = {True: [], False: []}, {}
        for i in range(REPEATS + 1):
            for graph in ((True, False), (False, True))[i % 2]:
                start = time.perf_counter()
                found[graph] = (graphs if graph else eager).score_ids(ids[:rows], own[:rows])
                times[graph].append(time.perf_counter() - start)
        slow, fast = (1000 * statistics.median(times[graph][1:]) for graph in (False, True))
        apart = abs(found[True] - found[False]).max()
        print(f"{rows:12}{slow:10.1f}{fast:10.1f}{slow / fast:8.2f}{apart:12.1e}")
    times = {True: [], False: []}
    for i in range(4):
        for graph in ((True, False), (False, True))[i % 2]:
            start = time.perf_counter()
            (graphs if graph else eager).score_ids(ids, own)
            times[graph].append(OFFLINE / (time.perf_counter() - start))
    print(f"{OFFLINE} rows offline: eager {max(times[False]):.0f}, with graphs {max(times[True]):.0f} rows/s")


def main(args):
    task = Task.load(ROOT / "data" / "creditmix_task.json")
    if args.model_dir == EMBEDDED:
        compare_with_prefill(*load_model(EMBEDDED, "fp32"), task)
    if not torch.cuda.is_available():
        compare_precisions(task)
    else:
        for precision in args.precisions:
            compare_with_graphs(args.model_dir, precision, task)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model_dir", default=EMBEDDED, help=f"model folder or hub id (default {EMBEDDED})")
    p.add_argument("--precisions", choices=["nf4", "bf16", "fp32"], nargs="+", default=["bf16"], help="(default bf16)")
    cli(main, p)
