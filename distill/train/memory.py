"""Memory of training, forecast before the weights load: what a step takes, and how many rows to compute at once."""

import os

from distill.files import UserError
from distill.hardware import cap_memory, choose_precision


def plan_micro_batch(
    rows: list[dict],
    student: str,
    config,
    precision: str,
    *,
    batch_size: int,
    micro_batch: int | None,
    lora_r: int,
    max_vram_gb: float | None,
) -> int:
    """Rows at once on each GPU: a divisor of its share of the batch, not above `micro_batch` if that is given.

    Caps the memory of this process at max_vram_gb and prints the forecast for the longest of the encoded rows. A single
    process starts from its whole share and finds out what fits (distill/train/out_of_memory.py). Several processes
    would wait for each other, so they compute as many rows as the forecast allows.
    student, config: name and configuration of the base model. precision: auto, nf4, bf16 or fp32.
    Errors: UserError when the processes cannot share the batch, or when the weights alone exceed the cap.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    per_device, rest = divmod(batch_size, world)
    if rest:
        raise UserError(f"--batch_size {batch_size}: expected a multiple of the {world} processes")
    cap = cap_memory(max_vram_gb)
    if max_vram_gb and not cap:
        print("--max_vram_gb: no GPU here, so there is nothing to cap")
    limit = min(micro_batch or (per_device if cap else 16), per_device)
    choices = [m for m in range(limit, 0, -1) if per_device % m == 0]
    precision, _ = choose_precision(config, precision)
    try:
        weights = expected_memory(config, precision, (0, 0, 0), lora_r, True)
        for chosen in choices:
            gib, shape = expected_step(config, precision, lora_r, longest_texts(rows, chosen))
            # the allocator reserves up to two thirds more than the tensors
            if not cap or world == 1 or micro_batch or gib < 0.6 * cap:
                break
    except AttributeError:
        print("expected memory: unknown for an architecture without attention and MLP of the usual names")
        return choices[0]
    print(f"expected memory: about {gib:.1f} GiB ({chosen} rows at once, as {shape[0]} trees of {shape[1]} tokens)")
    if cap and weights > cap:
        needed = f"{weights:.1f} GiB of weights in {precision} under {cap:.1f} GiB"
        raise UserError(f"{student}: {needed}; {hint(precision)}")
    return chosen


def hint(precision: str) -> str:
    """What to change when a run does not fit."""
    flags = "--max_len, --lora_r or --student" + ("" if precision == "nf4" else ", or --precision nf4")
    return f"expected a smaller {flags}"


def longest_texts(rows: list[dict], n: int) -> list[tuple[list[int], int]]:
    """(token ids, number of trained ones) of all texts of the n longest rows (encode)."""
    longest = sorted(rows, key=lambda r: -max(len(ids) for ids, _ in r["texts"]))[:n]
    return [text for row in longest for text in row["texts"]]


def expected_step(config, precision: str, lora_r: int, texts: list[tuple[list[int], int]]) -> tuple[float, tuple]:
    """(GiB at the peak of a step on `texts`, its packed shape). texts: (token ids, number of trained ones)."""
    from distill.model.token_tree import packed_shape

    shape = packed_shape([ids for ids, _ in texts], [trained for _, trained in texts])
    return expected_memory(config, precision, shape, lora_r, precision == "nf4"), shape


def expected_memory(config, precision: str, shape: tuple[int, int, int], lora_r: int, checkpointing: bool) -> float:
    """GiB of tensors at the peak of a training step, from the config alone.

    shape: (trees or rows B, width L, trained tokens K) of a micro-batch (token_tree.packed_shape). Not included: the
    CUDA context (some 0.4 GiB), what the allocator reserves beyond the tensors (up to two thirds), and the state of a
    paged optimizer, which torch does not allocate. The three coefficients were fitted on tests/bench_train.py.
    """
    from distill.model.fused_lora import CHUNK

    c = config.get_text_config()
    hidden, inner, layers = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    head = getattr(c, "head_dim", None) or hidden // c.num_attention_heads
    q, kv = c.num_attention_heads * head, c.num_key_value_heads * head
    b, length, trained = shape
    tokens = b * length
    # 4 bits, a byte for each 64 of them, and 4 bytes for each 256 of those bytes: double quantisation
    bytes_per_weight = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "bf16": 2, "fp32": 4}[precision]
    wide = 4 if precision == "fp32" else 2
    weights = bytes_per_weight * layers * (2 * hidden * q + 2 * hidden * kv + 3 * hidden * inner)
    weights += wide * c.vocab_size * hidden * (1 if c.tie_word_embeddings else 2)
    adapter = lora_r * layers * (6 * hidden + 2 * q + 2 * kv + 3 * (hidden + inner))
    state = 12 if precision == "nf4" else 20  # weight, gradient, EMA in fp32; Adam's moments are paged for nf4
    # kept for the backward pass: the input of every layer, and some multiples of it for a layer not recomputed
    saved = wide * tokens * hidden * (layers + 9 if checkpointing else 8 * layers)
    mlp = 12 * wide * min(tokens, CHUNK) * inner  # gate, up, their products and gradients of one chunk (fused_lora.py)
    mask = (1 + wide) * b * length * length
    logits = trained * min(c.vocab_size, 32768) * wide + 8 * trained * hidden
    return (weights + state * adapter + saved + mlp + mask + logits) / 2**30
