"""A model folder as a GGUF file for llama.cpp and Ollama: hyperparameters, tokenizer, tensors.

The `gguf` package names the tensors and packs the numbers; what is decided here is what each architecture needs beside
that. Tensors are read, packed and written one at a time, so the file may be larger than the memory.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    TokenType,
    get_tensor_name_map,
    quant_shape_to_byte_shape,
    quants,
)
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from distill.files import UserError

# model_type of config.json -> name of the architecture in the gguf package and in llama.cpp
ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
# Types of matrices that the gguf package can quantise to -> bits per weight
BITS = {"f16": 16, "bf16": 16, "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5}
# Which matrices keep more bits: mixes from the smallest file to the most faithful one, in the order of what each kind
# of matrix costs a label's probability for the bits it saves, measured one kind at a time (runs/README.md). llama.cpp
# quantises what goes into a quantised matrix too: in 8 bits the last hidden state before the vocabulary costs most
# (one of its values is 20 times the others), then ffn_down. In 4 bits the weights' own rounding costs most.
WIDE_ENDS = {"token_embd": "F16", "output": "F16"}
FINE_ATTENTION = dict.fromkeys(("attn_k", "attn_v", "attn_output"), "Q8_0")
MIXES = {
    16: ({},),
    8: ({}, WIDE_ENDS, {**WIDE_ENDS, "ffn_down": "F16"}),
    4: (
        {"token_embd": "Q8_0", "output": "Q8_0"},
        {**WIDE_ENDS, **FINE_ATTENTION, "ffn_up": "Q8_0"},
        {**WIDE_ENDS, **FINE_ATTENTION, "ffn_up": "Q8_0", "ffn_gate": "Q8_0"},
    ),
}
# Regular expressions by which a byte-level tokenizer cuts a text before merging, and llama.cpp's name for them
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (QWEN_SPLIT,): "qwen2",
    (QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),): "llama-bpe",
}


def check_types(names: list[str]) -> None:
    """UserError for the first of `names` that is not one of BITS."""
    for name in names:
        if "_k" in name.lower() or name.lower().startswith(("iq", "tq")):
            raise UserError(
                f"--gguf {name}: llama.cpp's own tool makes this one: export f16, then "
                f"`llama-quantize MODEL-f16.gguf MODEL-{name.lower()}.gguf {name.upper()}`"
            )
        if name not in BITS:
            raise UserError(f"--gguf {name}: unknown; expected some of {' '.join(BITS)}")


def check_model(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """UserError, by name, for a model whose GGUF would compute something else than the model does.

    name: what the user calls the model.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{name}: no GGUF for the architecture '{kind}'; expected one of {', '.join(ARCHITECTURES)}, or --gguf "
            "without a value for the merged folder alone"
        )
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    odd = {
        f"rope scaling '{rope}'": rope not in ("default", "llama3"),
        "a sliding window": bool(getattr(config, "use_sliding_window", False)),
        f"activation '{config.hidden_act}'": config.hidden_act != "silu",
        "biases of the attention": kind == "qwen3" and bool(config.attention_bias),
        "biases of the MLP": bool(getattr(config, "mlp_bias", False)),
    }
    for what, found in odd.items():
        if found:
            raise UserError(f"{name}: no GGUF for a {kind} model with {what}")
    pre_tokenizer(tokenizer)


def pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name for how a tokenizer cuts texts before merging (the metadata field tokenizer.ggml.pre).

    It is taken from the tokenizer's parts and not from the model's name: the embedded student's tokenizer, which was
    itself read from a GGUF, does not split digits as SmolLM2's on the hub does, and was trained with as it is. Nor is
    it read from tokenizer.json, since transformers builds Qwen's by itself.
    Error: UserError for a tokenizer that is no byte-level BPE, or cuts in a way that is not in PRE_TOKENIZERS.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    if parts["model"]["type"] != "BPE" or parts["model"].get("byte_fallback"):
        raise UserError(f"{tokenizer.name_or_path}: no GGUF for this tokenizer; expected a byte-level BPE")
    top = parts["pre_tokenizer"] or {"type": "none"}
    cuts = []
    for part in top.get("pretokenizers", [top]):
        if part["type"] == "Split":
            cuts.append(part["pattern"].get("Regex"))
        elif part["type"] != "ByteLevel" or part.get("use_regex", True):
            cuts.append(part["type"])
    if tuple(cuts) not in PRE_TOKENIZERS:
        raise UserError(f"{tokenizer.name_or_path}: no GGUF for this tokenizer: it cuts texts by {cuts}")
    return PRE_TOKENIZERS[tuple(cuts)]


def mixes(kind: str) -> tuple[dict[str, str], ...]:
    """{tensor: ggml type} of the matrices that are not of type `kind`: one such mix, or several to choose from."""
    return MIXES[16 if BITS[kind] == 16 else 8 if BITS[kind] > 8 else 4]


def write_gguf(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    kind: str,
    name: str,
    mix: dict[str, str] | None = None,
) -> None:
    """Write the model in `folder` (16-bit or 32-bit safetensors) to the GGUF file `path`.

    kind: one of BITS. name: in the metadata. mix: one of mixes(kind), by default the first.
    """
    config = AutoConfig.from_pretrained(folder)
    architecture = MODEL_ARCH[ARCHITECTURES[config.model_type]]
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[architecture])
    try:
        add_hyperparameters(writer, config, name)
        writer.add_file_type(LlamaFileType[f"MOSTLY_{kind.upper()}"])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        add_tokenizer(writer, tokenizer, config.vocab_size)
        mix = mixes(kind)[0] if mix is None else mix
        tensors = list(plan(folder, config, architecture, kind.upper(), mix))
        for tensor in tensors:
            size = int(np.prod(quant_shape_to_byte_shape(tensor.shape, tensor.type)))
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            values = tensor.read()
            if not np.isfinite(values).all():
                raise UserError(f"{folder}: {tensor.source} holds values that are no finite numbers")
            if tensor.type == GGMLQuantizationType.F16 and abs(values).max() > np.finfo(np.float16).max:
                raise UserError(f"{folder}: {tensor.source} does not fit the range of f16; expected --gguf bf16")
            writer.write_tensor_data(quants.quantize(values, tensor.type))
        writer.flush()
    finally:
        writer.close()


def add_hyperparameters(writer: GGUFWriter, config: PreTrainedConfig, name: str) -> None:
    rope = config.rope_parameters or {}
    head = head_size(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope.get("rope_theta", 10_000.0))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Tokens, merges, special tokens and chat template of a byte-level BPE; of `size` tokens the last may be unused.

    No token is added in front of a text: the chat template writes all of them, in training as in scoring.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    texts, kinds = [f"[PAD{i}]" for i in range(size)], [TokenType.UNUSED] * size
    for text, i in parts["model"]["vocab"].items():
        texts[i], kinds[i] = text, TokenType.NORMAL
    for token in parts["added_tokens"]:
        special = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        texts[token["id"]], kinds[token["id"]] = token["content"], special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in parts["model"]["merges"]])
    for name in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file, not yet read. source: its name in the model folder; read() -> float32 array."""

    name: str
    source: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def plan(
    folder: Path, config: PreTrainedConfig, architecture: MODEL_ARCH, kind: str, mix: dict[str, str]
) -> Iterator[Tensor]:
    """The tensors of the file, in its order.

    Error: UserError for a tensor that the architecture does not have.
    """
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    if (config.rope_parameters or {}).get("rope_type") == "llama3":
        factors = llama3_factors(config)
        yield Tensor("rope_freqs.weight", "rope_parameters", GGMLQuantizationType.F32, factors.shape, lambda: factors)
    for file, source in weights_of(folder):
        if source == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"{folder}: no GGUF for its tensor {source}")
        with safe_open(file, "pt") as weights:
            shape = tuple(weights.get_slice(source).get_shape())
        kept = tensor_type(shape, mix.get(name.split(".")[-2], kind))
        yield Tensor(name, source, kept, shape, functools.partial(read_tensor, file, source, config))


def read_tensor(file: Path, source: str, config: PreTrainedConfig) -> np.ndarray:
    """A tensor of the model folder in float32, its rows in llama.cpp's order."""
    with safe_open(file, "pt") as weights:
        values = weights.get_tensor(source).to(torch.float32).numpy()
    if config.model_type == "llama" and ".q_proj." in source:
        return interleaved(values, config.num_attention_heads)
    if config.model_type == "llama" and ".k_proj." in source:
        return interleaved(values, config.num_key_value_heads)
    return values


def weights_of(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, tensor name) of all safetensors in `folder`."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            yield from ((file, name) for name in weights.keys())  # noqa: SIM118 - it is no dict


def tensor_type(shape: Sequence[int], kind: str) -> GGMLQuantizationType:
    """The ggml type of a tensor: `kind`, but vectors stay in 32 bits and rows that no block divides in 16."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    chosen = GGMLQuantizationType[kind]
    return chosen if shape[-1] % GGML_QUANT_SIZES[chosen][0] == 0 else GGMLQuantizationType.F16


def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection [heads * d, ...] in the order in which llama.cpp rotates Llama's.

    transformers rotates row i with row i + d/2 of a head, llama.cpp's `llama` rotates neighbours (2i, 2i + 1).
    """
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def llama3_factors(config: PreTrainedConfig) -> np.ndarray:
    """By what Llama 3's rope scaling divides each frequency, float32 [head / 2]."""
    head = head_size(config)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, head, 2, dtype=torch.float32) / head)
    return (plain / scaled).numpy()
