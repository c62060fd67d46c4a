"""Flags of the three trainers, and the part of TRL's configuration that they share."""

import os
import platform
from pathlib import Path

from common import SEED
from distill.files import UserError, between, positive
from distill.model.hub import DEFAULT_STUDENT


def add_arguments(p, data, save_dir, lr):
    p.add_argument("--student", default=DEFAULT_STUDENT, help="hub id, folder or smollm2-135m (default: %(default)s)")
    p.add_argument("--data", type=Path, default=Path(data), help="training rows (default: %(default)s)")
    p.add_argument("--save_dir", type=Path, default=Path(save_dir), help="adapter folder (default: %(default)s)")
    p.add_argument("--task", type=Path, help="label task; default: NAME_task.json beside NAME_sft.jsonl, if there")
    p.add_argument("--epochs", type=positive(float), default=3, help="passes over the rows (default: %(default)s)")
    p.add_argument("--max_steps", type=positive(int), help="stop after so many steps, whatever --epochs says")
    p.add_argument("--lr", type=positive(float), default=lr, help="peak learning rate (default: %(default)s)")
    p.add_argument("--batch_size", type=positive(int), default=16, help="of all GPUs together (default: 16)")
    p.add_argument("--micro_batch", type=positive(int), help="rows at once; default: the batch on a GPU, 8 on a CPU")
    p.add_argument("--max_vram_gb", type=positive(float), help="GiB that torch may reserve; default: the GPU's memory")
    p.add_argument(
        "--lora_r", type=positive(int), default=16, help="rank of a fresh adapter, alpha is twice that (default: 16)"
    )
    p.add_argument("--max_len", type=positive(int), default=1024, help="longer rows are dropped (default: 1024)")
    p.add_argument("--dev_rows", type=positive(int), help="development rows; default: 1000 on a GPU, 100 on a CPU")
    p.add_argument("--eval_steps", type=positive(int), help="steps between evaluations; default: 8 a run")
    p.add_argument("--precision", choices=["auto", "nf4", "bf16", "fp32"], default="auto", help="of the base model")
    p.add_argument(
        "--seed",
        type=between(int, 0, 2**32 - 1),
        default=SEED,
        help="of split, order and adapter (default: %(default)s)",
    )
    p.add_argument("--resume_from_checkpoint", metavar="PATH|last", help="go on from a checkpoint of this run")
    return p


def micro_batch(args):
    """(rows at once on each GPU, times they are accumulated) before anything was tried.

    Error: UserError where the processes cannot share the batch.
    """
    import torch

    world = int(os.environ.get("WORLD_SIZE", 1))
    own, rest = divmod(args.batch_size, world)
    if rest:
        raise UserError(f"--batch_size {args.batch_size}: expected a multiple of the {world} processes")
    most = min(args.micro_batch or (own if torch.cuda.is_available() else 8), own)
    micro = next(m for m in range(most, 0, -1) if own % m == 0)  # so that the batch is what was asked
    return micro, own // micro


def training_arguments(args, model, rows, dev, task, passes=1):
    """What TRL's three configs have in common. The effective batch is what was asked, whatever fits at once.

    passes: how many of args.epochs the rows already hold (noisy_copies).
    """
    import torch

    cuda, large = torch.cuda.is_available(), model.precision == "nf4"
    micro, accumulate = micro_batch(args)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if cuda and world > 1 and not args.micro_batch:  # several processes cannot try what fits: the estimate has to do
        from distill.train.memory import expected_to_fit

        micro, accumulate = expected_to_fit(args, model, rows, micro * accumulate)
    epochs = args.epochs / passes
    steps = args.max_steps or max(1, int(epochs * len(rows) / args.batch_size))
    every = args.eval_steps or max(2, steps // 8)  # the first step has learning rate 0
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(args.save_dir) / "tensorboard")
    print(f"{steps} steps of {micro} x {accumulate} accumulated x {world} processes; evaluation every {every}")
    return {
        "output_dir": str(args.save_dir),
        "num_train_epochs": epochs,
        "max_steps": args.max_steps or -1,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": args.lr,
        # The first steps, which learn to answer with a label at all, have the largest gradients by far; at the usual
        # 0.999 their memory outlives a short run and keeps its later steps small. A small batch, whose gradients are
        # noisier, remembers as many rows as one of 32 (arXiv 2507.07101).
        "adam_beta2": 0.95 ** min(1, args.batch_size / 32),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # below 1 it is a share
        "optim": "paged_adamw_32bit" if cuda and large else "adamw_torch",
        "bf16": model.precision != "fp32",
        # recomputing activations costs a forward pass; a small model has room for them. TRL still asks by the old name
        "gradient_checkpointing": large,
        "eval_strategy": "steps" if dev else "no",
        "save_strategy": "steps",
        "eval_steps": every,
        "save_steps": every,
        "save_total_limit": 2,
        "load_best_model_at_end": bool(dev),
        "metric_for_best_model": "eval_label_log_loss" if task else "eval_loss",  # what serving ranks by
        "greater_is_better": False,
        "logging_steps": max(1, min(10, steps // 20)),
        "logging_nan_inf_filter": False,  # it would show the mean of earlier losses in place of a NaN
        "report_to": "tensorboard",
        "dataloader_pin_memory": cuda and "microsoft" not in platform.release(),  # WSL2 limits pinned memory
        "use_cpu": not cuda,
        "seed": args.seed,
    }
