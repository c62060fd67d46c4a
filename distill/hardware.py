"""What this process computes on: device, memory, precision."""

import os


def device():
    """The device this process computes on; under `accelerate launch` each process has its own GPU."""
    import torch

    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"


def cap_memory(gib=None):
    """GiB that torch may reserve on this process's GPU: `gib` from now on, else all of it; None on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    whole = torch.cuda.get_device_properties(device()).total_memory / 2**30
    if gib and gib < whole:
        torch.cuda.set_per_process_memory_fraction(gib / whole, device())
    return min(gib or whole, whole)


def room():
    """Bytes for weights on each device, as accelerate asks: a third of this process's GPU share is for activations."""
    import torch
    from accelerate.utils import get_max_memory

    free = get_max_memory()
    if torch.cuda.is_available():
        gpu = device().index
        whole = torch.cuda.get_device_properties(gpu).total_memory
        share = torch.cuda.get_per_process_memory_fraction(gpu) * whole
        free = {gpu: int(min(free[gpu], share) * 2 / 3), "cpu": free["cpu"]}
    return free


def device_key():
    """The key of this process's device in `room()`."""
    place = device()
    return place if place == "cpu" else place.index


def weight_bytes(config, precision):
    """Bytes of a model's weights in "nf4", "bf16" or "fp32", from its config alone: linear layers count in 4 bits.

    In NF4 with double quantisation a weight takes half a byte, plus one byte per 64 weights and 4 bytes per 256 of
    those. Embeddings, norms and lm_head stay in 16 bits.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wide = 4 if precision == "fp32" else 2
    total = wide * sum(p.numel() for p in model.parameters())  # tied weights count once
    if precision == "nf4":
        head = model.get_output_embeddings()
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        total += sum((0.5 + 1 / 64 + 4 / (64 * 256) - wide) * m.weight.numel() for m in layers)
    return int(total)


def choose_precision(config, precision="auto"):
    """(precision, why): "nf4" where 16 bits would not leave room on a small card, "bf16" on a GPU, "fp32" on a CPU."""
    if precision != "auto":
        return precision, "as asked"
    # embeddings and head stay in 16 bits either way: below about 1e9 weights 4 bits save little and cost accuracy
    text = config.get_text_config()
    large = text.hidden_size * text.num_hidden_layers >= 40_000
    if str(device()).startswith("cuda"):
        return ("nf4", "a large model on a GPU") if large else ("bf16", "a small model on a GPU")
    return ("nf4", "a large model on a CPU") if large else ("fp32", "CPU: bf16 is emulated on many")
