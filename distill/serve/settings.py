"""Settings of the server, from environment variables."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from common import Task, read_shares
from distill.files import ROOT, UserError
from distill.model.hub import DEFAULT_STUDENT, EMBEDDED

MODELS = ("base", "sft", "kd", "dpo")
PRECISIONS = ("auto", "nf4", "bf16", "fp32")


@dataclass(frozen=True)
class Settings:
    """base: hub id or folder of the base model. folders: adapter name -> folder. deadline: seconds per request.

    max_queue: rows that may wait. max_row_tokens: of one row with its prompt; None for four times the 99th percentile
    of the training rows. max_vram_gb: GiB that torch may reserve; None for the default. precision: of the base model.
    class_prior: the class mix to answer for (Calibration.for_prior); None for that of each model's training.
    """

    base: str
    folders: dict[str, Path]
    task: Task
    api_key: str
    deadline: float
    max_queue: float
    max_row_tokens: float | None
    max_vram_gb: float | None
    precision: str
    class_prior: str | None

    @classmethod
    def from_environment(cls) -> "Settings":
        """Error: UserError naming the variable."""
        base = os.environ.get("BASE_MODEL") or DEFAULT_STUDENT
        precision = os.environ.get("PRECISION") or "auto"
        if precision not in PRECISIONS:
            raise UserError(f"environment: PRECISION: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
        task = Task.load(os.environ.get("TASK") or ROOT / "data" / "creditmix_task.json")
        class_prior = os.environ.get("CLASS_PRIOR") or None
        if class_prior not in (None, "natural", "balanced"):
            try:
                read_shares(class_prior, task)
            except UserError as e:
                raise UserError(f"environment: CLASS_PRIOR: {e}") from None
        stem = "smollm2" if base == EMBEDDED and task.name == "creditmix" else task.name
        default = {name: ROOT / "runs" / f"{stem}_{name}" for name in MODELS[1:]}
        return cls(
            base=base,
            folders={name: Path(os.environ.get(f"{name.upper()}_DIR") or default[name]) for name in default},
            task=task,
            api_key=os.environ.get("API_KEY", ""),
            deadline=positive_variable("DEADLINE", 30.0),
            max_queue=positive_variable("MAX_QUEUE", 512.0),
            max_row_tokens=positive_variable("MAX_ROW_TOKENS", None),
            max_vram_gb=positive_variable("MAX_VRAM_GB", None),
            precision=precision,
            class_prior=class_prior,
        )


def positive_variable(name: str, default: float | None) -> float | None:
    """The number in an environment variable, or `default` where it is unset or empty."""
    text = os.environ.get(name)
    if not text:
        return default
    if not re.fullmatch(r"\d{1,9}(\.\d+)?", text) or float(text) == 0:
        raise UserError(f"environment: {name}: expected a number above 0, got {text!r}")
    return float(text)
