"""The flags of the three trainers, and what their TRL configurations have in common."""

import argparse
import math
import os
import platform
import statistics
from pathlib import Path

from common import SEED
from distill.files import between, positive
from distill.hardware import is_large
from distill.model.hub import DEFAULT_STUDENT

# Learning rates of a (small, large) student, as is_large says. Small: measured (runs/README.md, "Default settings").
# Large: not measured here, the rate of QLoRA for 7B and 13B (arXiv 2305.14314) and of Unsloth's and Hugging Face's
# recipes. DPO: not measured on its own; between its rate in runs/creditmix.sh (2e-4) and the usual ones.
LEARNING_RATES = {"sft": (1e-3, 2e-4), "kd": (1e-3, 2e-4), "dpo": (1e-4, 1e-4)}
CPU_RATES = LEARNING_RATES | {"sft": (2e-3, 2e-4), "kd": (2e-3, 2e-4)}  # its runs are short, and those take more
EPOCHS, ROWS = 3, 16
EVALUATIONS = {"cuda": 8, "cpu": 4}  # of the development rows in a run, the last one after its last step
# On a CPU a step of the smallest student takes some seconds for 16 rows of 50 tokens, and a minute for 8 documents
CPU_CHARACTERS = 8000  # of a step at most: about 2,000 tokens
CPU_STEPS = 200  # at most, where neither --epochs nor --max_steps is given


def add_arguments(parser: argparse.ArgumentParser, route: str) -> None:
    """Add the flags that all trainers have. route: sft, kd or dpo, for its own data, folder and learning rate."""
    add, (small, large), (short, _) = parser.add_argument, LEARNING_RATES[route], CPU_RATES[route]
    data, save_dir = Path(f"data/creditmix_{route}.jsonl"), Path(f"runs/creditmix_{route}")
    rates = f"{small:g}"
    if small != large:
        rates += f" for a student below about 1e9 weights, on a CPU {short:g}; {large:g} above"
    add("--student", default=DEFAULT_STUDENT, help="hub id, folder or smollm2-135m (default: %(default)s)")
    add("--data", type=Path, default=data, help="training rows (default: %(default)s)")
    add("--save_dir", type=Path, default=save_dir, help="adapter folder (default: %(default)s)")
    add("--task", type=Path, help="label task; default: NAME_task.json beside NAME_sft.jsonl, if there")
    add(
        "--epochs",
        type=positive(float),
        help=f"passes over the rows; default: {EPOCHS}, on a CPU {CPU_STEPS} steps at most",
    )
    add("--max_steps", type=positive(int), help="stop after this many steps, whatever --epochs says")
    add("--lr", type=positive(float), help=f"peak learning rate; default: {rates}")
    add("--batch_size", type=positive(int), help="rows per step, over all GPUs; default: 16, on a CPU fewer long ones")
    add("--micro_batch", type=positive(int), help="rows at once; default: the batch, on a CPU at most 16")
    add("--max_vram_gb", type=positive(float), help="GiB that torch may reserve; default: the GPU's memory")
    add("--lora_r", type=positive(int), default=16, help="rank of a fresh adapter, alpha is twice that (default: 16)")
    add("--max_len", type=positive(int), default=1024, help="longer rows are dropped (default: 1024)")
    add("--dev_rows", type=positive(int), help="development rows; default: 1000 on a GPU, 100 on a CPU")
    add("--eval_steps", type=positive(int), help="steps between evaluations; default: 8 evaluations, 4 on a CPU")
    add("--precision", choices=["auto", "nf4", "bf16", "fp32"], default="auto", help="of the base model")
    add(
        "--seed",
        type=between(int, 0, 2**32 - 1),
        default=SEED,
        help="of split, order and adapter (default: %(default)s)",
    )
    add("--resume_from_checkpoint", metavar="PATH|last", help="continue from a checkpoint of this run")
    add("--overwrite", action="store_true", help="replace the run in --save_dir, finished or not")


def choose_settings(
    route: str,
    config,
    rows: list[dict],
    lr: float | None = None,
    batch_size: int | None = None,
    epochs: float | None = None,
    max_steps: int | None = None,
) -> tuple[float, int, float, int | None]:
    """(learning rate, rows per step, epochs, most steps) of a run: as given, with defaults where None is given.

    config: of the student, whose size decides the learning rate. rows: of the training file; long ones make a step on a
    CPU take fewer of them.
    """
    import torch

    cuda = torch.cuda.is_available()
    lr = lr or (LEARNING_RATES if cuda else CPU_RATES)[route][is_large(config)]
    if not batch_size and cuda:
        batch_size = ROWS
    elif not batch_size:
        characters = statistics.median(sum(len(v) for v in row.values() if isinstance(v, str)) for row in rows)
        batch_size = max(1, min(ROWS, int(CPU_CHARACTERS / characters)))
    steps = EPOCHS * len(rows) // batch_size
    if not (cuda or epochs or max_steps) and steps > CPU_STEPS:
        max_steps = CPU_STEPS
        print(f"{CPU_STEPS} steps of {batch_size} rows, the default on a CPU; --epochs {EPOCHS} would be {steps} steps")
    return lr, batch_size, epochs or EPOCHS, max_steps


def add_swap_argument(parser: argparse.ArgumentParser) -> None:
    """Add --swap_augmentation. run.json records it as swap_noise, the flag's former name."""
    parser.add_argument(
        "--swap_augmentation",
        "--swap_noise",
        dest="swap_noise",
        type=between(float, 0, 1),
        default=0.0,
        metavar="SHARE",
        help="share of a label row's fields that each copy takes from other rows of its label (default: 0)",
    )


def passes_over(rows: int, *, epochs: float, max_steps: int | None, batch_size: int) -> int:
    """How many times a run meets each of its rows, rounded up: augmentation makes one copy for each."""
    return math.ceil(max_steps * batch_size / rows if max_steps else epochs)


def best_metric(is_label_task: bool, learns_text: bool) -> str:
    """The development metric that chooses the checkpoint.

    A label task: the loss of the label scores, which inference ranks by. Text: the share of its tokens that greedy
    decoding would choose. The loss of text is lowest long before its greedy answers are best (runs/README.md, IDP).
    Distributions over tokens: their loss.
    """
    if is_label_task:
        return "eval_label_log_loss"
    return "eval_mean_token_accuracy" if learns_text else "eval_loss"


def training_arguments(
    save_dir: Path,
    *,
    rows: int,
    epochs: float,
    max_steps: int | None,
    batch_size: int,
    micro_batch: int,
    learning_rate: float,
    eval_steps: int | None,
    evaluate: bool,
    best_metric: str,
    precision: str,
    seed: int,
) -> dict:
    """What SFTConfig and DPOConfig have in common, as keyword arguments of either.

    rows: number of training rows. micro_batch: rows at once on each GPU, accumulated until they are batch_size rows.
    evaluate: whether there are development rows. best_metric: the metric of them that chooses the checkpoint.
    precision: of the loaded base model (nf4, bf16, fp32).
    """
    import torch

    cuda, quantised = torch.cuda.is_available(), precision == "nf4"
    world = int(os.environ.get("WORLD_SIZE", 1))
    accumulate = batch_size // world // micro_batch
    steps = max_steps or math.ceil(epochs * math.ceil(rows / batch_size))  # as transformers counts them
    every = eval_steps or max(2, steps // EVALUATIONS["cuda" if cuda else "cpu"])  # the first step has learning rate 0
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(save_dir / "tensorboard")
    what = "evaluation" if evaluate else "checkpoint"
    print(f"{steps} steps of {micro_batch} x {accumulate} accumulated x {world} processes; {what} every {every}")
    return {
        "output_dir": str(save_dir),
        "num_train_epochs": epochs,
        "max_steps": max_steps or -1,
        "per_device_train_batch_size": micro_batch,
        "per_device_eval_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": learning_rate,
        # The first steps, which learn to answer with a label at all, have the largest gradients by far. With the usual
        # 0.999 they dominate the second moment of a short run and keep its later steps small. A smaller batch has
        # noisier gradients and averages over as many rows as one of 32 (arXiv 2507.07101).
        "adam_beta2": 0.95 ** min(1, batch_size / 32),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # below 1 it is a share of the steps
        "optim": "paged_adamw_32bit" if cuda and quantised else "adamw_torch",
        "bf16": precision != "fp32",
        # recomputing activations costs a forward pass; a small model has memory to keep them
        "activation_checkpointing": quantised,
        "eval_strategy": "steps" if evaluate else "no",
        "save_strategy": "steps",
        "eval_steps": every,
        "save_steps": every,
        "save_total_limit": 2,
        "load_best_model_at_end": evaluate,
        "metric_for_best_model": best_metric,
        "greater_is_better": best_metric.endswith("accuracy"),
        "logging_steps": max(1, min(10, steps // 20)),
        "logging_nan_inf_filter": False,  # it would log the mean of earlier losses in place of a NaN
        "report_to": "tensorboard",
        "dataloader_pin_memory": cuda and "microsoft" not in platform.release(),  # WSL2 limits pinned memory
        "use_cpu": not cuda,
        "seed": seed,
    }
