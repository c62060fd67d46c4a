"""The active adapter of a PEFT model in two kernels per projection, for forward passes that all rows share.

PEFT takes ten: casts, dropout, both products, scaling, sum. Where a single token is decoded, launching and writing them
takes longer than the base's own product.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from peft import PeftModel

from distill.model.stacked_lora import lora_layers, matrices, stackable


class ActiveAdapter:
    """Scaled copies of the adapter's matrices as the model computes. Make a new one when the weights change."""

    def __init__(self, model: PeftModel, name: str):
        dtype = model.get_input_embeddings().weight.dtype
        self.layers = []
        for layer in lora_layers(model):
            pair = matrices(layer, [name], [layer.r[name]], dtype) if name in layer.lora_A else None
            self.layers.append((layer, pair))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model's projections are computed that way."""
        for layer, pair in self.layers:
            base = layer.get_base_layer()
            layer.forward = functools.partial(project, base, *pair) if pair else base.forward
        try:
            yield
        finally:
            for layer, _ in self.layers:
                del layer.forward


def project(base: torch.nn.Module, a: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """base(x) + x A' B' -> [..., out]. x [..., in], A [r, in], B [out, r]."""
    out = base(x)
    rows = x.view(-1, x.shape[-1])
    return out.view(-1, out.shape[-1]).addmm_(rows @ a.t(), b.t()).view(out.shape)


def active_adapter(model) -> ActiveAdapter | None:
    """The model's active adapter, where it has exactly one, switched on and computable this way."""
    if not isinstance(model, PeftModel) or len(model.active_adapters) != 1 or adapters_off(model):
        return None
    return ActiveAdapter(model, model.active_adapters[0]) if stackable(model) else None


def adapters_off(model: torch.nn.Module) -> bool:
    """Whether a context of PEFT has switched the adapters off."""
    return any(getattr(module, "_disable_adapters", False) for module in model.modules())


def adapter_state(model) -> tuple[tuple[str, ...], bool, int]:
    """What changes with the adapters: which are active, whether they are off, how often their weights were written."""
    if not isinstance(model, PeftModel):
        return (), False, 0
    written = sum(p._version for name, p in model.named_parameters() if "lora_" in name)
    return tuple(model.active_adapters), adapters_off(model), written
