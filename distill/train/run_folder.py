"""The folder of a run: checkpoints, run.json, adapter, calibration, curve, model card."""

import os
import shlex
import shutil
import sys
import zipfile
from pathlib import Path

from common import fit_and_save, row_hash, task_file
from distill.files import UserError, atomic_write, check_row, file_sha256, read_json, write_json
from distill.model.hub import adapter_sha256
from distill.run_record import run_record

# what a resumed run may have otherwise; everything else must be the same, so that a new flag is never forgotten
FREE = {"save_dir", "resume_from_checkpoint", "micro_batch", "max_vram_gb", "eval_steps", "teacher_timeout"}


def may_start(args, route):
    """Look before anything is overwritten or computed: the folder, and what --resume_from_checkpoint names.

    A resumed run must be the same run: other rows would go unseen by the evaluation's overlap check.
    -> {field: value} by which run.json tells the run from another.
    """
    if os.environ.get("OFFLOAD_FOLDER"):  # autograd would hold the weights of every layer
        print("OFFLOAD_FOLDER is not used in training")
    now = {"route": route, "student": args.student, "data_sha256": file_sha256(args.data)}
    now |= {k: str(v) for k, v in vars(args).items() if k not in FREE}
    # what flags name may have changed behind the name
    if task_file(args).is_file():
        now["task_sha256"] = file_sha256(task_file(args))
    for name in ("init_adapter", "teacher"):
        if getattr(args, name, None) and (sha256 := adapter_sha256(getattr(args, name))):
            now[f"{name}_sha256"] = sha256
    checkpoints = checkpoints_in(args.save_dir)
    if not args.resume_from_checkpoint:
        if any((p / "trainer_state.json").is_file() for p in checkpoints):
            raise UserError(f"{args.save_dir}: an unfinished run; expected --resume_from_checkpoint last")
        if (Path(args.save_dir) / "README.md").is_file() and not (Path(args.save_dir) / "run.json").is_file():
            raise UserError(f"{args.save_dir}: its README.md is no run's; expected --save_dir, a folder of its own")
        return now
    if args.resume_from_checkpoint == "last":
        found = [p for p in checkpoints if (p / "trainer_state.json").is_file()]
        if not found:
            raise UserError(f"{args.save_dir}: no checkpoint to resume from; start without --resume_from_checkpoint")
        args.resume_from_checkpoint = str(found[-1])
    folder = Path(args.resume_from_checkpoint)
    if not (folder / "trainer_state.json").is_file():
        raise UserError(f"{folder}: no checkpoint; expected a folder runs/NAME/checkpoint-STEP, or `last`")
    damaged = damaged_file(folder)
    if damaged:
        raise UserError(f"{damaged}: missing or damaged; expected an earlier checkpoint, or {folder} removed")
    before = read_json(folder.parent / "run.json")
    check_row(folder.parent / "run.json", before, {"same": dict}, {})
    before = before["same"]
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(f"{folder}: field '{name}' of its run.json is {before.get(name)!r}; expected {value!r}")
    return now


def start_run(args, route, same=None):
    """Begin the run's folder -> the first fields of its record. same: of may_start, where it was asked long before."""
    same = same or may_start(args, route)
    if not args.resume_from_checkpoint and int(os.environ.get("RANK", 0)) == 0:
        for part in checkpoints_in(args.save_dir):
            if not (part / "trainer_state.json").is_file():  # of a run that was killed while it wrote its first
                shutil.rmtree(part)
        write_json(Path(args.save_dir) / "run.json", {"status": "started", "same": same, **run_record(args)})
    return {"route": route, "data_sha256": same["data_sha256"], "same": same}


def checkpoints_in(folder):
    """Its checkpoint-STEP folders in the order of steps."""
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name.split("-")[1].isdecimal()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def damaged_file(checkpoint):
    """The first file of a checkpoint folder that is not there or was not written to its end, or None."""
    from safetensors import SafetensorError, safe_open

    fsdp = (checkpoint / "optimizer.bin").is_file()
    own = ["optimizer.bin"] if fsdp else ["optimizer.pt", "weights.pt"]
    for name in ("adapter_model.safetensors", *own, "scheduler.pt", "trainer_state.json"):
        path = checkpoint / name
        try:
            if path.suffix == ".json":
                check_row(path, read_json(path), {"global_step": int}, {})
            elif path.suffix == ".safetensors":
                safe_open(path, "pt")
            elif not zipfile.is_zipfile(path):  # torch.save writes one, its directory last
                return path
        except (UserError, SafetensorError, OSError):
            return path
    states = checkpoint.glob("rng_state*.pth")
    return next((path for path in states if not zipfile.is_zipfile(path)), None)


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


SHOWN = {
    "loss": "loss",
    "learning_rate": "learning rate",
    "eval_loss": "development loss",
    "eval_accuracy": "accuracy",
    "eval_label_log_loss": "label log-loss",
}


def step_line(step, logs):
    """One line for the terminal of all that a trainer logs at a step."""
    return f"step {step}: " + ", ".join(f"{name} {logs[key]:.4g}" for key, name in SHOWN.items() if key in logs)


def draw_curve(history, path):
    """Loss, and development accuracy where there is one, by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    points = {k: [(h["step"], h[k]) for h in history if k in h] for k in ("loss", "eval_loss", "eval_accuracy")}
    figure, axes = plt.subplots(1, 2 if points["eval_accuracy"] else 1, figsize=(10, 4), squeeze=False)
    for key, label, axis in (
        ("loss", "training", axes[0, 0]),
        ("eval_loss", "development", axes[0, 0]),
        ("eval_accuracy", "development", axes[0, -1]),
    ):
        if points[key]:
            axis.plot(*zip(*points[key], strict=True), marker="." if key != "loss" else None, label=label)
            axis.set(xlabel="step", ylabel="accuracy" if key == "eval_accuracy" else "loss")
            axis.legend()
    figure.tight_layout()
    with atomic_write(path, "wb") as f:
        figure.savefig(f, dpi=110, format="png")
    plt.close(figure)


HUB = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # what the hub and vLLM call the embedded student


def write_card(folder, record, args):
    lines = [
        "---",
        f"base_model: {HUB.get(args.student, args.student)}",
        "library_name: peft",
        "---",
        f"# {folder.name}",
        "",
        f"LoRA adapter (r={args.lora_r}) for `{args.student}`, route {record['route'].upper()}, made by Distill-SLM.",
        "",
        f"- data: `{args.data}`, {record['rows']} rows after the development split"
        + (f", task `{record['task']}`" if record["task"] else ""),
        f"- {record['steps']} steps, {record['precision']}, {record['seconds']} s, {record['samples_per_s']} samples/s",
    ]
    if "dev" in record:
        lines.append(
            f"- development accuracy {record['dev']['accuracy']:.3f} on {record['dev']['rows']} rows (fitted), those "
            "that chose checkpoint and calibration: eval_creditmix.py has the held-out figure"
        )
    given = {k: v for k, v in vars(args).items() if v is not None and k != "resume_from_checkpoint"}
    flags = shlex.join(str(word) for k, v in given.items() for word in (f"--{k}", v))
    lines += ["", "Made by:", "", f"    python {Path(sys.argv[0]).name} {flags}", ""]
    lines += ["Its text comes from `run.json` beside it, which holds versions, hardware and the loss.", ""]
    with atomic_write(folder / "README.md") as f:
        f.write("\n".join(lines))
