"""What a run leaves to be read: its record, the loss curve, the model card."""

import shlex
import sys
from pathlib import Path

from common import ROOT, atomic_write


def run_record(args):
    """What a run should leave behind to be repeated: command, resolved arguments, versions, commit, machine, time."""
    import platform
    import subprocess
    from datetime import UTC, datetime
    from importlib.metadata import version

    import torch

    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    cuda = torch.cuda.is_available()
    return {
        "command": " ".join(["python", *sys.argv]),
        "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or None,
        "versions": {p: version(p) for p in ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets")},
        "python": platform.python_version(),
        "hardware": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
    }


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
