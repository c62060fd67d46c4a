"""Adapter folders: what they were trained on, and putting one on a base model."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from distill.files import UserError, check_row, file_sha256, read_json


def adapter_sha256(name):
    """Of the weights of an adapter folder, by which one that was trained again is another model; None of a base."""
    weights = Path(name) / "adapter_model.safetensors"
    return file_sha256(weights) if weights.is_file() else None


def adapter_base(folder):
    """The base model's name that an adapter folder was trained on; UserError when the folder is no adapter."""
    config = read_json(Path(folder) / "adapter_config.json")
    check_row(f"{folder}/adapter_config.json", config, {"base_model_name_or_path": str}, {})
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder}: adapter_model.safetensors is missing; expected a folder that a trainer wrote")
    return config["base_model_name_or_path"]


def add_adapter(model, folder, name="default", trainable=False):
    """The base model with one more adapter from `folder`; UserError when it does not fit or did not load."""
    from peft import PeftModel

    try:
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name=name)
        else:
            base, model = model, PeftModel.from_pretrained(model, folder, adapter_name=name, is_trainable=trainable)
            model.precision = base.precision
    except (RuntimeError, ValueError, TypeError, LookupError, SafetensorError) as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(f"{folder}: does not load on {model.config.name_or_path}: {reason}") from None
    # PEFT leaves what it did not find at its initial zero, and the base model would answer (peft#2699)
    zero = [n for n, p in model.named_parameters() if f"lora_B.{name}." in n and not p.any()]
    if zero:
        raise UserError(f"{folder}: {len(zero)} matrices are missing or zero on this base, for example {zero[0]}")
    return model.eval()


def check_plain(folder):
    """UserError unless the adapter is LoRA that leaves the base as it is, for other adapters stand beside it."""
    path = Path(folder) / "adapter_config.json"
    config = read_json(path)
    odd = [f for f in ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters") if config.get(f)]
    odd += ["bias"] * (config.get("bias", "none") != "none") + ["peft_type"] * (config.get("peft_type") != "LORA")
    if odd:
        raise UserError(f"{path}: field '{odd[0]}': expected plain LoRA, which leaves the base as it is")


def check_adapter(folder):
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
