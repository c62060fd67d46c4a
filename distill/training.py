"""What the three trainers share: the student with its adapter, the run, and the folder that it leaves."""

import os
import platform
import shutil
import signal
import sys
import time
from pathlib import Path

from common import (
    DEFAULT_STUDENT,
    SEED,
    LabelScorer,
    UserError,
    add_adapter,
    atomic_write,
    base_config,
    between,
    fit_and_save,
    label_classes,
    load_base,
    log_loss,
    positive,
    prompt_of,
    row_hash,
    write_json,
)
from distill.hardware import cap_memory, choose_precision
from distill.report import draw_curve, run_record, step_line, write_card

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# ---------------------------------------------------------------------------------------------------------------------
# The student


def load_student(args, rows, base=None):
    """(model, tokenizer) of args.student under --max_vram_gb; what a step is expected to take is told before loading.

    base: base_config(args.student), where it is known. Error: UserError where the weights alone are more than the cap.
    """
    from distill.memory import expected_memory, expected_step, longest_texts, smaller

    cap = cap_memory(args.max_vram_gb)
    if args.max_vram_gb and not cap:
        print("--max_vram_gb: no GPU here, so there is nothing to cap")
    _, config, tokenizer = base = base or base_config(args.student)
    precision, _ = choose_precision(config, args.precision)
    micro, _ = micro_batch(args)
    try:
        gib, shape = expected_step(args, config, precision, longest_texts(tokenizer, rows, micro, args.max_len))
        weights = expected_memory(config, precision, (0, 0, 0), args.lora_r, True)
    except AttributeError:
        print("expected memory: not known for an architecture without attention and MLP of the usual names")
    else:
        print(f"expected memory: about {gib:.1f} GiB ({micro} rows at once, as {shape[0]} trees of {shape[1]} tokens)")
        if cap and weights > cap:
            raise UserError(
                f"{args.student}: {weights:.1f} GiB of weights in {precision} under {cap:.1f} GiB; {smaller(precision)}"
            )
    model, tokenizer = load_base(args.student, args.precision, base)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # evaluation would rewrite 4-bit weights for a CPU kernel that gives the layers below no gradient
            module.support_avx512bf16_for_cpu = False
    return model, tokenizer


def lora_config(args, model):
    """An adapter on all linear layers of the student (QLoRA, arXiv 2305.14314), whatever it calls them."""
    from peft import LoraConfig

    names, targets = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}, TARGETS
    if not set(TARGETS) <= names:
        targets = "all-linear"
        print(f"adapter on all linear layers: no {', '.join(sorted(set(TARGETS) - names))} in this model")
    config = LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, lora_dropout=0.05, target_modules=targets)
    if "mamba" in model.config.model_type:  # its kernels read these weights past the adapter
        config.exclude_modules = ["out_proj", "dt_proj"]
    config.task_type, config.base_model_name_or_path = "CAUSAL_LM", args.student
    return config


def lora(model, args, init_adapter=None):
    """The student with a fresh adapter, or with a trained one to go on from."""
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(args.seed)  # TRL would do so only after the adapter is drawn
    if init_adapter:
        return add_adapter(model, init_adapter, trainable=True)
    return get_peft_model(model, lora_config(args, model))


def trainer_class(trainer, task, dev):
    """`trainer`, a TRL trainer, with what all routes add: shared prefixes, fused layers, fp32 adapters, accuracy."""
    from accelerate.utils import gather_object
    from torch.nn.parallel import DistributedDataParallel
    from tqdm import tqdm

    from distill.fused import fuse
    from distill.mean import Averaged
    from distill.memory import InParts
    from distill.trees import share_prefixes, why_no_trees

    class Student(Averaged, InParts, trainer):
        needs_trees = False

        def __init__(self, *args, **kwargs):
            config = kwargs["args"]
            if config.n_gpu > 1:  # one process would copy the model to all of them and multiply the batch
                print(f"one of {config.n_gpu} GPUs is used; all of them: accelerate launch {Path(sys.argv[0]).name}")
                config._n_gpu = 1
            super().__init__(*args, **kwargs)
            self.share()
            trainable = [p for p in self.model.parameters() if p.requires_grad]
            for p in trainable:  # TRL casts them to bf16 on a quantised base, where small steps round to nothing
                p.data = p.data.float()
            if not self.is_fsdp_enabled:  # which lends a projection its weights only while that module runs
                fuse(self.model)
            self.trainable = trainable
            self.follow_weights()
            n, total = sum(p.numel() for p in trainable), sum(p.numel() for p in self.model.parameters())
            print(f"trainable: {n:,} of {total:,} parameters ({n / total:.2%})")

        def share(self):
            base = self.model.get_base_model()
            if hasattr(base, "shares_prefixes"):
                return
            why = why_no_trees(base, longest_row(self.train_dataset))
            base.shares_prefixes = not why
            if not why:
                share_prefixes(base, self.processing_class.pad_token_id)
            elif self.needs_trees:
                raise UserError(f"a teacher's distribution needs a tree mask, but {why}; expected teacher_output alone")
            else:
                print(f"each row by itself, common beginnings computed again: {why}")

        def training_step(self, model, inputs, num_items_in_batch=None):
            if not isinstance(model, DistributedDataParallel):
                return super().training_step(model, inputs, num_items_in_batch)
            with model.no_sync():  # it would copy each of an adapter's hundreds of gradients to its buckets and back
                loss = super().training_step(model, inputs, num_items_in_batch)
            if self.accelerator.sync_gradients:
                average_gradients(self.trainable)
            return loss

        def _precompute_ref_logps(self, dataset, name, batch_size):  # DPO calls it before __init__ returns
            self.share()
            if self.args.world_size == 1:
                return super()._precompute_ref_logps(dataset, name, batch_size)
            # TRL leaves them in a file of the first process's own temporary folder, where no other finds them
            rank, world, found = self.args.process_index, self.args.world_size, []
            own = range(rank, len(dataset), world)
            for part in tqdm([own[i : i + batch_size] for i in range(0, len(own), batch_size)], "reference log-probs"):
                batch = self._prepare_inputs(self.data_collator([dataset[i] for i in part]))
                chosen, rejected = self.compute_ref_log_probs(self.model, batch)
                found += zip(part, chosen.tolist(), rejected.tolist(), strict=True)
            found = sorted(gather_object(found))
            dataset = dataset.add_column("ref_chosen_logps", [c for _, c, _ in found])
            return dataset.add_column("ref_rejected_logps", [r for _, _, r in found])

        def evaluate(self, *args, metric_key_prefix="eval", **kwargs):
            with self.averaged():
                metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
                if task and dev:
                    raw, _, y = dev_scores(self.model, self.processing_class, task, dev)
                    found = {"accuracy": float((raw.argmax(1) == y).mean()), "label_log_loss": log_loss(raw, y)}
                    found = {f"{metric_key_prefix}_{k}": v for k, v in found.items()}
                    self.log(found)
                    metrics |= found
            if self.is_world_process_zero():
                tqdm.write(step_line(self.state.global_step, metrics))
            return metrics

    return Student


def average_gradients(parameters):
    """The mean over all processes, in one message: each gradient becomes a view of it, so none is copied back."""
    import torch

    # one that a process's rows did not reach has none there, and all must send the same
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p)


def longest_row(rows):
    """Tokens of the longest text in a dataset of token ids."""
    if "input_ids" in rows.column_names:
        return max(map(len, rows["input_ids"]))
    answers = [rows[c] for c in ("chosen_ids", "rejected_ids") if c in rows.column_names]
    return max(len(p) + max(map(len, own), default=0) for p, *own in zip(rows["prompt_ids"], *answers, strict=True))


def dev_scores(model, tokenizer, task, dev):
    """(raw [N, L], prior [L], true classes [N]) of development rows, by the scorer that serves."""
    training = model.training
    model.eval()
    scorer = LabelScorer(model, tokenizer, task.labels, task.null_prompts())
    raw, prior = scorer.score([prompt_of(r) for r in dev]), scorer.prior(task)
    model.train(training)
    known = [{"answer": r.get("output") or r.get("chosen") or r["teacher_output"]} for r in dev]
    return raw, prior, label_classes("development rows", known, "answer", task)


# ---------------------------------------------------------------------------------------------------------------------
# The run


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
        from distill.memory import expected_to_fit

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


def run_training(trainer, args, task, dev, record, prompts):
    """Train, or go on; keep the best checkpoint; write the adapter folder. Ctrl-C and SIGTERM save first."""
    import torch
    from peft.helpers import disable_input_dtype_casting
    from transformers.trainer_callback import ProgressCallback, TrainerCallback

    from distill.memory import fit_micro_batch

    several = trainer.args.world_size > 1

    class Progress(ProgressCallback):  # TensorBoard and the history have all that TRL measures, the terminal a line
        def on_log(self, _args, state, control, logs=None, **kwargs):
            if self.training_bar is not None and "loss" in logs:
                self.training_bar.write(step_line(state.global_step, logs))

    class Interrupt(TrainerCallback):
        asked = 0  # the signal's number

        def on_step_end(self, _args, state, control, **kwargs):
            if several:  # all processes stop behind the same step
                own = torch.tensor([Interrupt.asked], device=trainer.args.device)
                Interrupt.asked = int(trainer.accelerator.gather(own).max())
            if Interrupt.asked:
                control.should_save = control.should_training_stop = True

    def interrupt(number, _):
        print("\ninterrupted: saving after this step", file=sys.stderr)
        Interrupt.asked = number
        if not several:  # a second one stops at once; a launcher passes on what the processes have already heard
            default_signals()

    if torch.cuda.is_available() and not several:  # ranks that probe alone would wait for each other
        fit_micro_batch(trainer)
    trainer.add_callback(Interrupt)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    start = time.time()
    # under autocast PEFT's own cast of every input to fp32 is undone at once: kernels and memory for nothing
    with disable_input_dtype_casting(trainer.model, active=trainer.args.bf16):
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    seconds = time.time() - start
    if Interrupt.asked:
        print(
            f"stopped at step {trainer.state.global_step}; the same command with --resume_from_checkpoint last goes on"
        )
        sys.exit(128 + Interrupt.asked)  # as a shell tells of a signal
    default_signals()
    if not trainer.state.best_model_checkpoint:  # whose adapter is the mean, and is loaded by now
        trainer.exchange()
    peak = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None  # without CUDA itself
    tensors = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    record |= {
        "student": args.student,
        "precision": trainer.model.get_base_model().precision,
        "task": task.name if task else None,
        "rows": len(prompts),
        "steps": trainer.state.global_step,
        "train_loss": result.training_loss,
        "best": trainer.state.best_metric,
        "seconds": round(seconds, 1),
        "samples_per_s": round(result.metrics["train_samples_per_second"], 2),
        "peak_gib": peak and round(peak, 2),
        "peak_tensors_gib": tensors and round(tensors, 2),
        "rows_at_once": -(-trainer.args.per_device_train_batch_size // trainer.parts),
    }
    # by every process, since under FSDP each holds a part of the weights
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else trainer.model.state_dict()
    weights = {k: v.to(torch.bfloat16) for k, v in state.items() if "lora_" in k and ".default." in k}
    scores = dev_scores(trainer.model, trainer.processing_class, task, dev) if task and dev else None
    if trainer.is_world_process_zero():
        finish(trainer, args, task, weights, scores, record, prompts)
    return record


def default_signals():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def finish(trainer, args, task, weights, scores, record, prompts):
    """The adapter folder: weights in bf16, task, calibration fitted on development rows, curve, run.json, card."""
    folder, model = Path(args.save_dir), trainer.model
    if not any(w.any() for name, w in weights.items() if "lora_B" in name):
        print(
            f"warning: {folder}: its best step changed nothing, so no stage will take it; more --max_steps",
            file=sys.stderr,
        )
    broken = [k for k, v in weights.items() if not v.isfinite().all()]
    if broken:
        raise UserError(f"{folder}: {broken[0]} holds NaN or infinity, so it is not written; expected a smaller --lr")
    hashes = {row_hash(p) for p in prompts}
    started_from = getattr(args, "init_adapter", None)
    if started_from and (started_from / "train_rows.txt").is_file():
        hashes |= set((started_from / "train_rows.txt").read_text(encoding="utf-8").split())
    with atomic_write(folder / "train_rows.txt") as f:  # first: no weights without what an evaluation compares
        f.writelines(h + "\n" for h in sorted(hashes))
    for stale in ("calibration.json", "task.json"):
        (folder / stale).unlink(missing_ok=True)
    part = folder / "adapter.tmp"
    model.save_pretrained(part, state_dict=weights, selected_adapters=["default"])
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        os.replace(part / name, folder / name)
    shutil.rmtree(part)
    if task:
        task.save(folder / "task.json")
    if scores:
        raw, prior, y = scores
        fit = fit_and_save(folder, task, raw, prior, y)
        record["dev"] = {"rows": len(y), "accuracy": float((fit(raw, prior).argmax(1) == y).mean())}
    draw_curve(trainer.state.log_history, folder / "curve.png")
    write_json(folder / "run.json", {"status": "finished", **record, **run_record(args)})
    write_card(folder, record, args)
    for checkpoint in folder.glob("checkpoint-*"):  # the best of them is the adapter now
        shutil.rmtree(checkpoint)
    peak = f", peak {record['peak_gib']} GiB" if record["peak_gib"] else ""
    print(f"adapter in {folder}: {record['samples_per_s']} samples/s, {record['seconds']} s{peak}")
    if "dev" in record:
        print(
            f"development accuracy {record['dev']['accuracy']:.3f}; next: python eval_creditmix.py --model_dir {folder}"
        )


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
