"""Settings of the server, from environment variables."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from common import Task
from distill.files import ROOT, UserError
from distill.model.hub import DEFAULT_STUDENT, EMBEDDED

MODELS = ("base", "sft", "kd", "dpo")


@dataclass(frozen=True)
class Settings:
    """base: hub id or folder of the base model. folders: adapter name -> folder. deadline: seconds per request.

    max_queue: rows that may wait. max_vram_gb: GiB that torch may reserve, None for the default.
    """

    base: str
    folders: dict[str, Path]
    task: Task
    api_key: str
    deadline: float
    max_queue: float
    max_vram_gb: float | None

    @classmethod
    def from_environment(cls) -> "Settings":
        """Error: UserError naming the variable."""
        base = os.environ.get("BASE_MODEL") or DEFAULT_STUDENT
        stem = "smollm2" if base == EMBEDDED else "creditmix"
        default = {name: ROOT / "runs" / f"{stem}_{name}" for name in MODELS[1:]}
        return cls(
            base=base,
            folders={name: Path(os.environ.get(f"{name.upper()}_DIR") or default[name]) for name in default},
            task=Task.load(os.environ.get("TASK") or ROOT / "data" / "creditmix_task.json"),
            api_key=os.environ.get("API_KEY", ""),
            deadline=positive_variable("DEADLINE", 30.0),
            max_queue=positive_variable("MAX_QUEUE", 512.0),
            max_vram_gb=positive_variable("MAX_VRAM_GB", None),
        )


def positive_variable(name: str, default: float | None) -> float | None:
    """The number in an environment variable, or `default` where it is unset or empty."""
    text = os.environ.get(name)
    if not text:
        return default
    if not re.fullmatch(r"\d{1,9}(\.\d+)?", text) or float(text) == 0:
        raise UserError(f"environment: {name}: expected a number above 0, got {text!r}")
    return float(text)
