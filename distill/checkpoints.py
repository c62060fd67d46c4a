"""The folder of a run: whether one may start there, or go on from a checkpoint, whole and of the same run."""

import os
import shutil
import zipfile
from pathlib import Path

from distill.files import UserError, check_row, file_sha256, read_json, task_file, write_json
from distill.models import adapter_sha256
from distill.report import run_record

# what a resumed run may have otherwise; everything else must be the same, so that a new flag is never forgotten
FREE = {"save_dir", "resume_from_checkpoint", "micro_batch", "max_vram_gb", "eval_steps", "teacher_timeout"}


def may_start(args, route):
    """Look before anything is overwritten or computed: the folder, and what --resume_from_checkpoint names.

    A resumed run must be the same run: other rows would go unseen by the evaluation's overlap check.
    -> {field: value} by which run.json tells the run from another.
    """
    if os.environ.get("OFFLOAD_FOLDER"):  # autograd holds the weights of every layer, or finds them gone
        raise UserError("OFFLOAD_FOLDER: layers that come and go cannot be trained through; expected it unset")
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
