"""What it takes to repeat a run: command, resolved arguments, versions, commit, machine, time."""

import shlex
import sys
from pathlib import Path

from distill.files import ROOT


def run_record(args):
    """What it takes to repeat a run: command, resolved arguments, versions, commit, machine, time.

    args: the parsed flags, or a dict of their names and values.
    """
    import platform
    import subprocess
    from datetime import UTC, datetime
    from importlib.metadata import version

    import torch

    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    cuda, flags = torch.cuda.is_available(), args if isinstance(args, dict) else vars(args)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "args": {k: str(v) if isinstance(v, Path) else v for k, v in flags.items()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or None,
        "versions": {p: version(p) for p in ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets")},
        "python": platform.python_version(),
        "hardware": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
    }
