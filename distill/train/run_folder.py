"""The folder of a run: checkpoints, run.json, adapter, calibration, curve, model card."""

import os
import shlex
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from common import Task, label_classes, prompt_of
from distill.calibrate import class_shares, fit_and_save, natural_shares, split_record
from distill.files import (
    StrictModel,
    UserError,
    atomic_write,
    check_output_folder,
    file_sha256,
    read_json,
    validate,
    write_json,
)
from distill.model.hub import adapter_sha256
from distill.run_record import run_record

# flags that a resumed run may change; all others must be equal, so that a new flag is never forgotten
CHANGEABLE = {"save_dir", "resume_from_checkpoint", "overwrite", "micro_batch", "max_vram_gb", "eval_steps"}
CHANGEABLE |= {"teacher_timeout", "price_in", "price_out", "max_cost", "yes"}

# what finish_run leaves, in the order in which --overwrite removes it: without its weights a folder is no adapter
RUN_FILES = ["adapter_model.safetensors", "adapter_config.json", "calibration.json", "task.json", "train_rows.txt"]
RUN_FILES += ["curve.png", "README.md", "run.json"]

# what only the folder of a whole model has; an adapter beside them would change what the folder loads as
MODEL_FILES = ["config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]


@dataclass(frozen=True)
class Run:
    """A training run as its folder records it.

    route: sft, kd, dpo. settings: every flag and its value. identity: what a checkpoint must have in common with the
    run that resumes it ("same" in run.json). checkpoint: the folder to resume from, or None. overwrite: whether the run
    replaces what stands in its folder.
    """

    route: str
    folder: Path
    student: str
    data: Path
    settings: dict
    identity: dict[str, str]
    checkpoint: Path | None
    overwrite: bool = False

    def record(self) -> dict:
        """The first fields of its run.json."""
        return {"route": self.route, "data_sha256": self.identity["data_sha256"], "same": self.identity}


def check_run(
    route: str,
    save_dir: Path,
    *,
    student: str,
    data: Path,
    settings: dict,
    resume: str | None = None,
    overwrite: bool = False,
    inputs: dict[str, Path | str | None] | None = None,
) -> Run:
    """Check the folder and the checkpoint to resume from, before anything is overwritten or computed.

    A resumed run must be the same run: it could otherwise be trained on rows that the evaluation's overlap check does
    not know of.
    settings: every flag and its value. resume: a checkpoint folder, or "last". overwrite: begin anew in a folder that
    holds a run; a resumed run ignores it.
    inputs: files and adapter folders, besides `data`, by the name of the flag. They may change while their path stays,
    so their hashes are part of the run's identity; what is neither a file nor an adapter folder is left out.
    Errors: UserError for a folder that holds something else, and for a checkpoint that is missing, damaged or of
    another run.
    """
    if os.environ.get("OFFLOAD_FOLDER"):  # autograd would hold the weights of every layer
        print("OFFLOAD_FOLDER is not used in training")
    identity = {"route": route, "student": student, "data_sha256": file_sha256(data)}
    identity |= {k: str(v) for k, v in settings.items() if k not in CHANGEABLE}
    for name, path in (inputs or {}).items():
        if path and (found := file_sha256(path) if Path(path).is_file() else adapter_sha256(path)):
            identity[f"{name}_sha256"] = found
    check_folder(save_dir, resume=resume, overwrite=overwrite, inputs=inputs)
    checkpoint = check_checkpoint(save_dir, resume, identity) if resume else None
    settings = settings | {"resume_from_checkpoint": checkpoint and str(checkpoint)}
    return Run(route, save_dir, student, data, settings, identity, checkpoint, overwrite)


def check_folder(
    save_dir: Path,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    inputs: dict[str, Path | str | None] | None = None,
) -> None:
    """Raise UserError unless a run may write into the folder. The part of check_run that needs no rows."""
    check_output_folder("--save_dir", save_dir)
    if model := next((name for name in MODEL_FILES if (save_dir / name).is_file()), None):
        raise UserError(f"{save_dir}: a whole model stands here ({model}); expected another --save_dir")
    if (found := finished_run(save_dir)) and (resume or not overwrite):
        more = "" if resume else ", or --overwrite to replace it"
        raise UserError(f"{save_dir}: a finished run stands here ({found}); expected another --save_dir{more}")
    for name, path in (inputs or {}).items():
        if overwrite and path and Path(path).resolve().is_relative_to(save_dir.resolve()):
            raise UserError(f"--overwrite would remove --{name} {path}; expected another --save_dir")
    if resume:
        find_checkpoint(save_dir, resume)
        return
    if not overwrite and any((p / "trainer_state.json").is_file() for p in checkpoints_in(save_dir)):
        raise UserError(f"{save_dir}: an unfinished run; expected --resume_from_checkpoint last, or --overwrite")
    path = save_dir / "run.json"
    if not overwrite and path.is_file():
        record = read_json(path)
        if not isinstance(record, dict) or "status" not in record:
            raise UserError(f"{path}: not the record of a run; expected another --save_dir, or --overwrite")
    if (save_dir / "README.md").is_file() and not path.is_file():
        raise UserError(f"{save_dir}: its README.md is not from a run; expected a --save_dir of its own")


def finished_run(folder: Path) -> str | None:
    """Base, rows and date of the finished run in a folder, or None. A run that is being written is not finished."""
    path = folder / "run.json"
    if not (folder / "adapter_model.safetensors").is_file():
        return None
    record = read_json(path) if path.is_file() else {}
    if not isinstance(record, dict) or record.get("status") == "started":
        return None
    rows = f"{record['rows']} rows" if "rows" in record else "rows unknown"
    return f"base {record.get('student', 'unknown')}, {rows}, {str(record.get('date', 'date unknown'))[:10]}"


class RunRecord(StrictModel):
    same: dict  # what a resumed run must have in common with the first


def find_checkpoint(save_dir: Path, resume: str) -> Path:
    """The checkpoint folder that `resume` names; UserError if there is none."""
    if resume == "last":
        whole = [p for p in checkpoints_in(save_dir) if (p / "trainer_state.json").is_file()]
        if not whole:
            raise UserError(f"{save_dir}: no checkpoint to resume from; start without --resume_from_checkpoint")
        resume = whole[-1]
    folder = Path(resume)
    if not (folder / "trainer_state.json").is_file():
        raise UserError(f"{folder}: not a checkpoint; expected a folder runs/NAME/checkpoint-STEP, or `last`")
    return folder


def check_checkpoint(save_dir: Path, resume: str, identity: dict[str, str]) -> Path:
    """The checkpoint folder that `resume` names; UserError unless it is whole and of the same run."""
    folder = find_checkpoint(save_dir, resume)
    damaged = damaged_file(folder)
    if damaged:
        raise UserError(f"{damaged}: missing or damaged; expected an earlier checkpoint, or {folder} removed")
    path = folder.parent / "run.json"
    before = validate(path, read_json(path), RunRecord)
    for name, value in identity.items():
        if (old := before.same.get(name)) != value:
            raise UserError(f"{folder}: field '{name}' of its run.json is {old!r}; expected {value!r}")
    return folder


def start_run(run: Run) -> None:
    """Begin the run's folder: run.json with status "started". A resumed run keeps what is there."""
    if run.checkpoint or int(os.environ.get("RANK", 0)):
        return
    for part in checkpoints_in(run.folder):  # without its state, of a run that was killed while it wrote its first
        if run.overwrite or not (part / "trainer_state.json").is_file():
            shutil.rmtree(part)
    if run.overwrite:  # files of two runs are never mixed
        for name in RUN_FILES:
            (run.folder / name).unlink(missing_ok=True)
        shutil.rmtree(run.folder / "tensorboard", ignore_errors=True)
    write_json(run.folder / "run.json", {"status": "started", "same": run.identity, **run_record(run.settings)})


def checkpoints_in(folder: Path) -> list[Path]:
    """Its checkpoint-STEP folders, ordered by step."""
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name.split("-")[1].isdecimal()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def damaged_file(checkpoint: Path) -> Path | None:
    """The first file of a checkpoint folder that is missing or was not written to its end, or None."""
    from safetensors import SafetensorError, safe_open

    fsdp = (checkpoint / "optimizer.bin").is_file()
    own = ["optimizer.bin"] if fsdp else ["optimizer.pt", "weights.pt"]
    for name in ("adapter_model.safetensors", *own, "scheduler.pt", "trainer_state.json"):
        path = checkpoint / name
        try:
            if path.suffix == ".json":
                read_json(path)["global_step"]
            elif path.suffix == ".safetensors":
                safe_open(path, "pt")
            elif not zipfile.is_zipfile(path):  # torch.save writes a zip file, its directory last
                return path
        except (UserError, SafetensorError, OSError, LookupError, TypeError):
            return path
    states = checkpoint.glob("rng_state*.pth")
    return next((path for path in states if not zipfile.is_zipfile(path)), None)


def finish_run(
    run: Run,
    model,
    weights: dict,
    record: dict,
    *,
    hashes: set[str],
    history: list[dict],
    task: Task | None = None,
    scores: tuple | None = None,
    train_rows: list[dict] = (),
    dev_rows: list[dict] = (),
) -> None:
    """Write the adapter folder: weights, task, calibration, train_rows.txt, curve, run.json, model card.

    model: the PeftModel. weights: its adapter's tensors as they are written. record: fields of run.json; gets "dev".
    hashes: of the rows trained on. history: the trainer's log history.
    scores: (raw [N, L], prior [L], classes [N]) of dev_rows, which the calibration is chosen on, for the class mix of
    train_rows.
    Errors: UserError for weights that are not finite, before anything is written.
    """
    folder = run.folder
    if not any(w.any() for name, w in weights.items() if "lora_B" in name):
        print(
            f"warning: {folder}: its best step changed nothing, so no stage will load it; expected more --max_steps",
            file=sys.stderr,
        )
    broken = [k for k, v in weights.items() if not v.isfinite().all()]
    if broken:
        raise UserError(f"{folder}: {broken[0]} holds NaN or infinity, so it is not written; expected a smaller --lr")
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
        gold = [{"answer": row.get("output") or row["answer"]} for row in train_rows]  # a teacher may say otherwise
        shares = class_shares(label_classes("training rows", gold, "answer", task), len(task.labels))
        split = split_record(run.data, run.identity["data_sha256"], task)
        natural = natural_shares(split, task)
        groups = [row.get("group") or prompt_of(row) for row in dev_rows]
        fit, _ = fit_and_save(folder, task, raw, prior, y, groups, shares, natural)
        record["dev"] = {"rows": len(y), "accuracy": float((fit(raw, prior).argmax(1) == y).mean())}
    draw_curve(history, folder / "curve.png")
    write_json(folder / "run.json", {"status": "finished", **record, **run_record(run.settings)})
    write_card(run, record, model.peft_config["default"].r)
    for checkpoint in folder.glob("checkpoint-*"):  # the best of them is the adapter now
        shutil.rmtree(checkpoint)
    peak = f", peak {record['peak_gib']} GiB" if record["peak_gib"] else ""
    print(f"adapter in {folder}: {record['samples_per_s']} samples/s, {record['seconds']} s{peak}")
    if "dev" in record:
        taught = any("teacher_output" in row and not row.get("output") for row in dev_rows)
        measure = "agreement with the teacher" if taught else "accuracy"
        command = shlex.join(["python", "eval_creditmix.py", "--model_dir", str(folder), *split.get("evaluate", [])])
        print(f"development {measure} {record['dev']['accuracy']:.3f}; next: {command}")


def draw_curve(history: list[dict], path: Path) -> None:
    """Draw the loss by step, and the development accuracy if there is one."""
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


def write_card(run: Run, record: dict, lora_r: int) -> None:
    """README.md of the adapter folder: a model card for the hub, with the command that made it."""
    lines = [
        "---",
        f"base_model: {HUB.get(run.student, run.student)}",
        "library_name: peft",
        "---",
        f"# {run.folder.name}",
        "",
        f"LoRA adapter (r={lora_r}) for `{run.student}`, route {run.route.upper()}, made by Distill-SLM.",
        "",
        f"- data: `{run.data}`, {record['rows']} rows after the development split"
        + (f", task `{record['task']}`" if record["task"] else ""),
        f"- {record['steps']} steps, {record['precision']}, {record['seconds']} s, {record['samples_per_s']} samples/s",
    ]
    if "dev" in record:
        lines.append(
            f"- development accuracy {record['dev']['accuracy']:.3f} on {record['dev']['rows']} rows (fitted), those "
            "that chose checkpoint and calibration: eval_creditmix.py has the held-out figure"
        )
    given = [(k, v) for k, v in run.settings.items() if k not in ("resume_from_checkpoint", "overwrite")]
    flags = shlex.join(word for k, v in given for word in flag_words(k, v))
    lines += ["", "Made by:", "", f"    python {Path(sys.argv[0]).name} {flags}", ""]
    lines += ["The figures are those of `run.json`, which also has versions, hardware and the loss.", ""]
    with atomic_write(run.folder / "README.md") as f:
        f.write("\n".join(lines))


def flag_words(name: str, value) -> list[str]:
    """A flag as it stands on the command line: none for None, False and an empty list, several words for a list."""
    if value is None or value is False or value == []:
        return []
    values = [] if value is True else value if isinstance(value, list) else [value]
    return [f"--{name}", *map(str, values)]
