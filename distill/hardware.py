"""What this process computes on: device, memory, precision."""

import functools
import os
import platform
import sys
import time

BF16_GAIN = 1.25  # how many times as fast as in fp32 products in bf16 have to be for a CPU to compute in bf16
WSL_RESERVE = 0.8  # GiB of the card that Windows needs for itself


def device():
    """The device this process computes on; under `accelerate launch` each process has its own GPU."""
    import torch

    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"


def cap_memory(gib: float | None = None) -> float | None:
    """Cap what torch may reserve on this process's GPU -> the cap in GiB; None on a CPU.

    gib: the cap; by default the one in force, else that of `default_cap`.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    whole = torch.cuda.get_device_properties(device()).total_memory / 2**30
    before = torch.cuda.get_per_process_memory_fraction(device())
    if not gib and before < 1:
        return before * whole
    if not gib:
        gib, note = default_cap(whole)
        if note:
            print(note, file=sys.stderr)
    if gib < whole:
        torch.cuda.set_per_process_memory_fraction(gib / whole, device())
    return min(gib, whole)


def default_cap(whole: float, release: str | None = None) -> tuple[float, str]:
    """(GiB, note): what a process may use of a card of `whole` GiB where the user sets no cap. All, but under WSL2.

    release: of the kernel, by default this machine's. WSL2's contains "microsoft".
    """
    if "microsoft" not in (release or platform.uname().release).lower():
        return whole, ""
    cap = whole - WSL_RESERVE
    reason = "beyond the card's free memory Windows moves GPU memory to RAM without an error, 10 to 50 times slower"
    return cap, f"WSL2: using at most {cap:.1f} of {whole:.1f} GiB: {reason}"


def room() -> dict[int | str, int]:
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


def device_key() -> int | str:
    """The key of this process's device in `room()`."""
    place = device()
    return place if place == "cpu" else place.index


def weight_bytes(config, precision: str) -> int:
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


def is_large(config) -> bool:
    """Whether a model has above about 1e9 weights, by width times depth.

    Embeddings and lm_head stay in 16 bits, so that below it 4 bits save little and cost accuracy.
    """
    text = config.get_text_config()
    return text.hidden_size * text.num_hidden_layers >= 40_000


@functools.cache
def bf16_gain() -> float:
    """How many times as fast as in fp32 this CPU multiplies matrices in bf16; 0 where it has no instructions for it.

    It is measured, in some 20 ms, since a flag does not tell: a CPU with AVX512-BF16 and without AMX may well take
    twice as long as in fp32. Time of other processes does not count.
    """
    import torch

    if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return 0.0
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, times = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype), []
        for _ in range(6):  # the first one loads the kernel
            started = time.thread_time()
            torch.nn.functional.linear(x, weight)
            times.append(time.thread_time() - started)
        seconds[dtype] = min(times[1:])
    return seconds[torch.float32] / max(seconds[torch.bfloat16], 1e-9)


def choose_precision(config, precision: str = "auto") -> tuple[str, str]:
    """(precision, why): "nf4" where 16 bits would not leave room on a small card, else "bf16" where it is fast.

    That is a GPU, and a CPU whose products in bf16 are faster than those in fp32.
    """
    if precision != "auto":
        return precision, "as asked"
    large = is_large(config)
    if str(device()).startswith("cuda"):
        return ("nf4", "a large model on a GPU") if large else ("bf16", "a small model on a GPU")
    if large:
        return "nf4", "a large model on a CPU"
    gain = bf16_gain()
    if not gain:
        return "fp32", "a CPU without bf16 instructions"
    return "bf16" if gain >= BF16_GAIN else "fp32", f"a CPU whose products in bf16 are {gain:.1f} times as fast"
