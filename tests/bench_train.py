"""Memory and speed of training, side by side in one run: the seed's recipe, plain TRL at its best batch, ours.

    python tests/bench_train.py --out bench.json                   # on a GPU: 3B under 8 GiB, embedded student
    python tests/bench_train.py --layers 2 --hidden 64 --rows 4 8  # a look at it on a CPU

The 3B student has the shape of Qwen2.5-3B and random weights in NF4, quantised as load_base does. Rows are the shipped
CreditMix prompts. A step is a whole optimizer step of the trainer, collation included; the first one is not counted.
The reference of DPO is computed in every step by plain TRL; ours computes it once, and a third of that (the default
three epochs) is added to the time of a step.
"""

import argparse
import gc
import itertools
import json
import random
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import Task, completion_ids, label_trie, load_base, prompt_ids
from distill.files import ROOT, write_json
from distill.hardware import device
from distill.model import token_tree as trees
from distill.train.memory import expected_memory
from distill.train.student import lora_config
from distill.train.trainer import StudentTrainer

GIB, EPOCHS = 2**30, 3
CUDA = torch.cuda.is_available()
RATE = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "L4": 121e12}  # dense bf16, FLOP/s
PLAIN = {"sft": [48, 64, 80, 96], "dpo": [16, 24, 28, 32]}
OURS = {"sft": [96, 160, 256, 320, 384, 448], "kd": [160, 256, 384], "dpo": [16, 80, 128, 160, 192, 224]}
PEFT_FITS = {"sft": 160, "kd": 160, "dpo": 96}  # rows at once without fused layers


def main(args):
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    results = {"device": torch.cuda.get_device_name() if CUDA else "CPU", "cap_gib": args.cap, "lines": []}
    print(f"{results['device']}, cap {args.cap} GiB; share: of its dense bf16 rate, 6PT a step with recomputation")
    for name in args.only:
        start = time.time()
        if name == "3b":
            model, tokenizer = qwen(args.layers, args.hidden), load_base("smollm2-135m", "fp32")[1]
        else:
            model, tokenizer = load_base("smollm2-135m")
        rows = creditmix(tokenizer, args.steps * max(map(max, OURS.values())))
        total = torch.cuda.get_device_properties(0).total_memory if CUDA else 0
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap * GIB / total))
        weights = sum(p.numel() * p.element_size() for p in model.parameters()) / GIB
        tokens = sum(len(r["input_ids"]) for r in rows["sft"]) / len(rows["sft"])
        print(f"\n== {name}: {weights:.2f} GiB of weights in {time.time() - start:.0f} s; {tokens:.0f} tokens a row")
        print(f"{'route':4} {'how':28} {'batch':>8} {'s/step':>7} {'rows/s':>8} {'tokens/s':>9} ", end="")
        print(f"{'reserved':>8} {'allocated':>9} {'estimate':>8} {'share':>6}", flush=True)
        for route in args.routes:
            results["lines"] += bench_route(name, route, model, tokenizer, rows, args)
            if args.out:
                write_json(args.out, results)
    for name in args.only:
        for route in args.routes:
            summary([r for r in results["lines"] if r["model"] == name], route)


def bench_route(name, route, model, tokenizer, rows, args):
    """The lines of one route: plain TRL by growing batch until it does not fit, the seed's recipe, ours with variants.

    KD has no plain lines: plain TRL knows no loss on label distributions, so its sequence KD is the SFT line.
    """
    done, plain, ours = [], args.rows or PLAIN.get(route, []), args.rows or OURS[route]

    def line(how, n, accumulate=1, steps=args.steps, **options):
        found = measure(route, how, model, tokenizer, rows[route], n, accumulate, steps, **options)
        found = {"model": name, "route": route, "how": how, "batch": n, "accumulate": accumulate, **options, **found}
        done.append(found)
        show(found)
        return "error" not in found

    if route != "kd" and "plain" in args.kinds:
        for n in plain:
            if not line("plain TRL", n):
                break
        line("seed", 1 if route == "sft" else 2, 16 if route == "sft" else 8, steps=1)
    if "ours" in args.kinds:
        for n in ours:
            if not line("ours", n):
                break
        fits = [r for r in done if r["how"] == "ours" and "error" not in r]
        best = max(fits, key=lambda r: r["rows_per_s"])["batch"] if fits else ours[0]
        for variant in args.variants:
            line("ours", min(best, PEFT_FITS[route]) if "peft" in variant else best, variant=variant)
        if route == "sft":
            for group in (10, 40):
                line("ours", best, group=group)
            line("ours", best, kept=1)
            line("ours", min(ours[0], best), kept=4)
    return done


# ---------------------------------------------------------------------------------------------------------------------
# Models and rows


def qwen(layers, hidden):
    """A model of random weights in the shape of Qwen2.5-3B (fewer layers or narrower on request), NF4 as load_base."""
    import bitsandbytes as bnb
    from transformers import BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    config = Qwen2Config(
        vocab_size=151936 if hidden >= 2048 else 49152,
        hidden_size=hidden,
        intermediate_size=hidden * 11008 // 2048,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(device()):
        model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    for parent in list(model.model.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, torch.nn.Linear):
                four = bnb.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    linear.bias is not None,
                    compute_dtype=torch.bfloat16,
                    compress_statistics=True,
                    quant_type="nf4",
                    device="meta",
                )
                data, kind = linear.weight.data, {"compress_statistics": True, "quant_type": "nf4"}
                four.weight = bnb.nn.Params4bit(data, requires_grad=False, module=four, **kind).to(device())
                four.bias = linear.bias
                four.support_avx512bf16_for_cpu = False  # as load_student
                setattr(parent, name, four)
    wanted = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model.hf_quantizer = AutoHfQuantizer.from_config(wanted)
    model.config.quantization_config, model.quantization_method = wanted, wanted.quant_method
    model.is_loaded_in_4bit = model.is_quantized = True
    model.precision = "nf4"
    model.name_or_path = model.config.name_or_path = "random-3b"
    return model.eval().requires_grad_(False)


def creditmix(tokenizer, n):
    """n shipped rows for each route, tokenised: {"sft", "kd", "dpo"}."""
    task = Task.load(ROOT / "data" / "creditmix_task.json")
    raw = json.loads((ROOT / "data" / "creditmix_dataset.json").read_text(encoding="utf-8"))
    rng = random.Random(0)
    raw = rng.sample(raw, min(n, len(raw)))
    prompts, answers = [task.prompt(r["question"]) for r in raw], [r["answer"] for r in raw]
    others = [rng.choice([x for x in task.labels if x != a]) for a in answers]
    ids = prompt_ids(tokenizer, prompts)
    chosen, rejected = completion_ids(tokenizer, prompts, answers), completion_ids(tokenizer, prompts, others)
    made = {"sft": [], "kd": [], "dpo": []}
    for p, c, r, a in zip(ids, chosen, rejected, answers, strict=True):
        made["sft"].append({"input_ids": p + c, "labels": [-100] * len(p) + c})
        teacher = [0.8 if label == a else 0.1 for label in task.labels]
        made["kd"].append({"prompt_ids": p, "teacher": teacher, "gold": task.labels.index(a)})
        made["dpo"].append({"prompt_ids": p, "chosen_ids": c, "rejected_ids": r})
    return made


# ---------------------------------------------------------------------------------------------------------------------
# One line


def measure(route, how, model, tokenizer, rows, n, accumulate, steps, group=20, kept=0, variant=None):
    """Seconds a step and memory of `steps` optimizer steps after a warm one, or {"error": why}."""
    from transformers import PrinterCallback, TrainerCallback

    times, shapes, need = [], [], n * accumulate * (steps + (how != "seed"))
    rows = (rows * (need // len(rows) + 1))[:need]

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **kwargs):
            times.append(now())
            if how == "ours":
                keep_activations(kwargs["model"], kept)

        def on_step_end(self, *_, **kwargs):
            times.append(now())

    def look(module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        shapes.append(tuple(ids.shape))

    trees.GROUP, trainer, hook, error = group, None, None, None
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(route, how, model, tokenizer, rows, n, accumulate, need // n // accumulate, folder)
            hook = trainer.model.get_base_model().model.register_forward_pre_hook(look, with_kwargs=True)
            if variant:
                VARIANTS[variant](trainer)
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(Clock())
            trainer.train()
            reference = reference_seconds(trainer, n) if route == "dpo" and how == "ours" else 0
    except torch.OutOfMemoryError:
        error = "out of memory"
    except Exception as e:  # a variant that fails must not hide the other lines
        error = f"{type(e).__name__}: {str(e).strip().splitlines()[0][:150] if str(e) else ''}"
        if not variant:
            import traceback

            traceback.print_exc()
    memory = [torch.cuda.max_memory_reserved() / GIB, torch.cuda.max_memory_allocated() / GIB] if CUDA else [0, 0]
    own = trainer.model if trainer is not None else None
    trainable = sum(p.numel() for p in own.parameters() if p.requires_grad) if own is not None else 0
    if hook:
        hook.remove()
    if own is not None:
        restore(own, model)
    checkpointing = bool(trainer and trainer.args.activation_checkpointing)
    del trainer, own
    if error:
        return {"error": error, "reserved_gib": round(memory[0], 2)}
    spent = [b - a for a, b in itertools.pairwise(times)][how != "seed" :]
    step = min(spent)
    a_row = step / (n * accumulate) + reference / EPOCHS
    computed = shapes[-1][0] * shapes[-1][1]  # of the last micro-batch
    tokens = sum(map(len, texts(rows)[0])) / len(rows)  # of a row, or of both answers to a prompt
    matrices = sum(m.in_features * m.out_features for k, m in model.model.named_modules() if hasattr(m, "in_features"))
    work = (
        (6 if checkpointing else 4) * matrices * computed * accumulate
    )  # frozen weights need no gradient of their own
    rate = next((v for k, v in RATE.items() if CUDA and k in torch.cuda.get_device_name()), None)
    shape = trees.packed_shape(*texts(rows[:n]), group if how == "ours" else 1)
    estimate = 0 if kept else expected_memory(model.config, model.precision, shape, 16, checkpointing)
    return {
        "s_per_step": round(step, 4),
        "rows_per_s": round(1 / a_row, 2),
        "tokens_per_s": round(tokens / a_row),
        "reference_s_per_row": round(reference, 5),
        "shape": shapes[-1],
        "expected_shape": shape,
        "trainable": trainable,
        "reserved_gib": round(memory[0], 3),
        "allocated_gib": round(memory[1], 3),
        "estimate_gib": round(estimate, 3),
        "share": round(work / step / rate, 4) if rate else None,
        "steps_s": [round(s, 3) for s in spent],
    }


def texts(rows):
    """(token ids, number of trained ones) of all texts that the rows make: one a row, two a pair, prompt and label."""
    if "labels" in rows[0]:
        return [r["input_ids"] for r in rows], [len(r["labels"]) - r["labels"].count(-100) for r in rows]
    if "teacher" in rows[0]:
        return [r["prompt_ids"] for r in rows], [1] * len(rows)
    answers = [(r["prompt_ids"], r[k]) for k in ("chosen_ids", "rejected_ids") for r in rows]
    return [p + a for p, a in answers], [len(a) for _, a in answers]


def make_trainer(route, how, model, tokenizer, rows, n, accumulate, steps, folder):
    """The trainer of a route: TRL's own with its LoRA ("seed", "plain TRL"), or as our scripts build it ("ours")."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    options = {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": n,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": 1e-4,
        "optim": "paged_adamw_32bit" if CUDA else "adamw_torch",
        "bf16": model.precision != "fp32",
        "activation_checkpointing": model.precision == "nf4" or how == "seed",
        "save_strategy": "no",
        "logging_steps": 1000,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not CUDA,
        "max_length": None,
    }
    columns = {k: [r[k] for r in rows] for k in rows[0]}
    ours, own = how == "ours", {}
    if ours:  # the memory forecast and the trainer read what each row trains on
        own["train_rows"] = [{"texts": list(zip(*texts([row]), strict=True))} for row in rows]

    class Sequence(StudentTrainer, SFTTrainer):
        pass

    class Pretokenized(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    if route == "kd":
        from distill.train.label_distribution import LabelTrainer
        from kd_train import distribution_loss

        options |= {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        trie = label_trie(tokenizer, Task.load(ROOT / "data" / "creditmix_task.json").labels)
        kind = partial(LabelTrainer, trie=trie, loss=partial(distribution_loss, temperature=1.0, alpha=0.0))
    elif route == "dpo":
        from dpo_train import dpo_trainer_class

        kind = dpo_trainer_class() if ours else Pretokenized
        if ours:  # the reference is timed by itself
            columns |= {"ref_chosen_logps": [-3.0] * len(rows), "ref_rejected_logps": [-3.0] * len(rows)}
    else:
        kind = Sequence if ours else SFTTrainer
    config = DPOConfig(**options) if route == "dpo" else SFTConfig(**options, shuffle_dataset=False)
    data, adapter = Dataset.from_dict(columns), lora_config(model, "random-3b", 16)
    made = kind(model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=adapter, **own)
    made.precompute_ref_logps = ours
    return made


def reference_seconds(trainer, n):
    """Seconds a pair that the reference's log-probs take, on the trainer's own rows in its own batch."""
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    n = min(n, 32)
    batch = trainer.data_collator([{c: trainer.train_dataset[i][c] for c in columns} for i in range(n)])
    batch = {k: v.to(trainer.args.device) for k, v in batch.items()}
    best = float("inf")
    for _ in range(2):
        start = now()
        trainer.compute_ref_log_probs(trainer.model, dict(batch))
        best = min(best, now() - start)
    return best / n


def restore(wrapped, model):
    """Take adapter, patched forwards and checkpointing off again, so that the next line finds the model as built."""
    wrapped.__dict__.pop("forward", None)
    wrapped.unload()
    source = sys.modules[type(model).__module__]
    if hasattr(source, "plain_rope"):
        source.apply_rotary_pos_emb = source.plain_rope
        del source.plain_rope
    for module in model.modules():
        module.__dict__.pop("forward", None)
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    model.disable_input_require_grads()
    model.__dict__.pop("shares_prefixes", None)
    model.requires_grad_(False)


def keep_activations(model, layers):
    """Keep the activations of the last `layers` decoder layers: the backward pass frees them first."""
    found = [m for m in model.modules() if hasattr(m, "gradient_checkpointing") and hasattr(m, "self_attn")]
    for layer in found[len(found) - layers :]:
        layer.gradient_checkpointing = False


def peft_layers(trainer):
    """PEFT's own layers in place of the fused ones."""
    base = trainer.model.get_base_model()
    for module in base.model.modules():
        module.__dict__.pop("forward", None)


def compiled_peft_layers(trainer):
    """PEFT's layers, attention and MLP through torch.compile; checkpointing stays outside."""
    peft_layers(trainer)
    torch._dynamo.config.cache_size_limit = 64
    for layer in trainer.model.get_base_model().model.layers:
        layer.self_attn.forward = torch.compile(layer.self_attn.forward, dynamic=True)
        layer.mlp.forward = torch.compile(layer.mlp.forward, dynamic=True)


def compiled_rope(trainer):
    """Rotary positions, the last chain of small kernels beside fused layers, through torch.compile."""
    module = sys.modules[type(trainer.model.get_base_model()).__module__]
    if not hasattr(module, "plain_rope"):
        module.plain_rope = module.apply_rotary_pos_emb
        module.apply_rotary_pos_emb = torch.compile(module.plain_rope, dynamic=True)


def unpaged(trainer):
    """Adam's moments on the GPU from the start, instead of in pages that move there."""
    trainer.args.optim = "adamw_torch"


VARIANTS = {"rope": compiled_rope, "peft": peft_layers, "peft compiled": compiled_peft_layers, "unpaged": unpaged}


def now():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def show(r):
    options = " ".join(f"{k}={r[k]}" for k in ("group", "kept", "variant") if k in r)
    head = f"{r['route']:4} {(r['how'] + ' ' + options).strip():28} {r['batch']:>4}x{r['accumulate']:<3}"
    if "error" in r:
        print(f"{head} {r['error']} (reserved {r['reserved_gib']})", flush=True)
        return
    share = f"{r['share']:6.1%}" if r["share"] else "     -"
    print(
        f"{head} {r['s_per_step']:7.3f} {r['rows_per_s']:8.1f} {r['tokens_per_s']:9,} {r['reserved_gib']:8.2f} "
        f"{r['allocated_gib']:9.2f} {r['estimate_gib']:8.2f} {share}",
        flush=True,
    )


def summary(lines, route):
    """Best of each kind, and the ratios that have bars."""
    best = {}
    for how in ("seed", "plain TRL", "ours"):
        of = "sft" if route == "kd" and how != "ours" else route
        fits = [r for r in lines if r["route"] == of and r["how"] == how and "error" not in r]
        best[how] = max(fits, key=lambda r: r["rows_per_s"], default=None)
    if not all(best.values()):
        return
    rates = {k: v["rows_per_s"] for k, v in best.items()}
    print(
        f"{best['ours']['model']:5} {route}: seed {rates['seed']:.1f}, plain TRL {rates['plain TRL']:.1f}, ours "
        f"{rates['ours']:.1f} rows/s: {rates['ours'] / rates['plain TRL']:.2f}x plain TRL at its best batch, "
        f"{rates['ours'] / rates['seed']:.0f}x the seed's recipe"
    )


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", default=["3b", "small"], choices=["3b", "small"])
    p.add_argument("--routes", nargs="+", default=["sft", "kd", "dpo"], choices=["sft", "kd", "dpo"])
    p.add_argument("--kinds", nargs="+", default=["plain", "ours"], choices=["plain", "ours"])
    p.add_argument("--variants", nargs="*", default=["peft"], choices=sorted(VARIANTS))
    p.add_argument("--rows", nargs="+", type=int, help="batches to try in place of the usual ones")
    p.add_argument("--layers", type=int, default=36)
    p.add_argument("--hidden", type=int, default=2048)
    p.add_argument("--steps", type=int, default=2, help="measured steps a line, after a warm one")
    p.add_argument("--cap", type=float, default=8.0, help="GiB that torch may reserve")
    p.add_argument("--out", type=Path, help="JSON of all lines")
    main(p.parse_args())
