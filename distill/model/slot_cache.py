"""Keys and values of many sequences in one preallocated tensor, a slot each: a token is written in place, never copied.

transformers' DynamicCache copies every layer's keys and values for each token, and its StaticCache has one length for
all rows. Here each row has its own length, so a sequence that ends makes room for a waiting one.
"""

from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from distill.files import one_line
from distill.model.token_tree import additive


@dataclass(frozen=True)
class KeyShape:
    """Keys of one token: layers, heads and width, and where they are kept."""

    layers: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.layers * self.heads * self.width * self.dtype.itemsize


class SlotCache(Cache):
    """store [layers, 2, slots, heads, capacity, width]. Set a mode (prefill, decode) before a forward pass."""

    def __init__(self, shape: KeyShape, slots: int, capacity: int):
        super().__init__(layers=[DynamicLayer() for _ in range(shape.layers)])  # it asks for some; they stay empty
        self.shape, self.slots, self.capacity = shape, slots, capacity
        # zeros: what is masked still is multiplied, by 0, and must be finite
        size = (shape.layers, 2, slots, shape.heads, capacity, shape.width)
        self.store = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        self.rows = torch.arange(slots, device=shape.device)

    def prefill(self, rows: torch.Tensor, start: int) -> "SlotCache":
        """Mode: T tokens each for slots `rows` [R], from position `start` on; before it all have the keys of slot 0."""
        self.mode = ("prefill", rows, start)
        return self

    def decode(self, positions: torch.Tensor, length: int) -> "SlotCache":
        """Mode: one token each for the first slots, at `positions` [B]; attention sees the first `length` columns."""
        self.mode = ("decode", positions, length)
        return self

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Write keys and values [R, heads, T, width]; what the layer attends to, the same with more columns."""
        kind, where, size = self.mode
        out = []
        for kept, new in zip(self.store[layer_idx], (key_states, value_states), strict=True):
            if kind == "decode":
                n = len(where)
                kept[self.rows[:n], :, where] = new[:, :, 0]
                out.append(kept[:n, :, :size])
            else:
                kept[where, :, size : size + new.shape[2]] = new
                out.append(torch.cat([kept[:1, :, :size].expand(len(new), -1, -1, -1), new], 2) if size else new)
        return tuple(out)

    def share_prefix(self, length: int) -> None:
        """Give all slots the first `length` columns of slot 0."""
        self.store[:, :, 1:, :, :length] = self.store[:, :, :1, :, :length]

    def move(self, source: int, target: int) -> None:
        """Copy one slot to another."""
        self.store[:, :, target] = self.store[:, :, source]


def key_shape(model: PreTrainedModel) -> KeyShape | str:
    """The shape of a model's keys, or why a SlotCache cannot hold them, as part of a sentence; it is tried."""
    try:
        return try_slots(model)
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, IndexError) as e:
        return f"its cache is of another kind ({type(e).__name__}: {one_line(e)[:80]})"


@torch.inference_mode()
def try_slots(model: PreTrainedModel, n: int = 6) -> KeyShape | str:
    """key_shape(model), by comparing two tokens decoded through a SlotCache with a plain forward pass."""
    if any(p.is_meta for p in model.parameters()):
        return "some of its layers are offloaded"
    ids = torch.arange(5, 5 + n, device=model.device)[None]
    plain = model(input_ids=ids, use_cache=True)
    cache = getattr(plain, "past_key_values", None)
    if not isinstance(cache, DynamicCache):
        return "it keeps a state instead of keys and values"
    other = sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer})
    if other:
        return f"its cache has layers of another kind ({', '.join(other)})"
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    shapes = {(part.shape[1], part.shape[3], part.dtype, part.device) for part in parts}
    if len(shapes) > 1:
        return "the keys and values of its layers differ in shape or device"
    shape = KeyShape(len(cache.layers), *shapes.pop())
    slots, last, row = SlotCache(shape, 2, 16), plain.logits[0, -1].float(), torch.zeros_like(ids[0, :1])
    prefill(model, ids[:, : n - 2], slots, row, row[None], 0)
    for at in (n - 2, n - 1):
        logits = decode_one(model, ids[:, at], slots, row + at, 16)
    # sixteen bits differ a little by path; a misplaced token makes the difference of another text
    if (logits[0].float() - last).norm() > 0.3 * (plain.logits[0, 0].float() - last).norm():
        return "its attention does not use the cache as given"
    return shape


def prefill(
    model: PreTrainedModel, ids: torch.Tensor, cache: SlotCache, rows: torch.Tensor, keep: torch.Tensor, start: int
) -> torch.Tensor:
    """Logits [R, V] at column keep [R, 1] of ids [R, T], for the slots `rows` [R] from position `start` on.

    Shorter rows are padded at the end, where causal attention does not see the padding.
    """
    columns = torch.arange(start + ids.shape[1], device=ids.device)
    see = columns <= columns[start:, None]
    out = model(
        input_ids=ids,
        position_ids=columns[start:].expand(len(ids), -1),
        attention_mask=additive(see, cache.shape.dtype)[None, None],
        past_key_values=cache.prefill(rows, start),
        use_cache=True,
        logits_to_keep=keep,
    )
    return out.logits[:, 0]


def decode_one(
    model: PreTrainedModel, tokens: torch.Tensor, cache: SlotCache, positions: torch.Tensor, length: int
) -> torch.Tensor:
    """Logits [B, V] after one token [B] for each of the first B slots, at `positions` [B] below `length`."""
    see = torch.arange(length, device=tokens.device) <= positions[:, None]
    out = model(
        input_ids=tokens[:, None],
        position_ids=positions[:, None],
        attention_mask=additive(see, cache.shape.dtype)[:, None, None],
        past_key_values=cache.decode(positions, length),
        use_cache=True,
    )
    return out.logits[:, -1]
