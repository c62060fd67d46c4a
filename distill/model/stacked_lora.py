"""The adapters of a PEFT model side by side: rows of different ones share a forward pass at the price of one adapter.

PEFT takes a mixed batch apart in every projection, adapter by adapter. On a GPU it is the launching of those kernels,
not their arithmetic, that sets the pace of a small model. Here all A lie in one matrix [R, in] and all B in another
[out, R], R being the sum of the ranks, and a mask keeps the part of x A' that belongs to the row's own adapter: three
kernels after the base's, for any number of adapters. (Punica, arXiv 2310.18547, and S-LoRA, arXiv 2311.03285, gather
the matrices instead, which pays for hundreds of adapters.)
"""

import contextlib
import functools

import torch


class StackedAdapters:
    """The adapters that a PEFT model has now. Make a new one when adapters come or go, or their weights change."""

    def __init__(self, model):
        layers, self.names = lora_layers(model), list(model.peft_config)
        ranks = [max(layer.r.get(name, 0) for layer in layers) for name in self.names]
        dtype, device = model.get_input_embeddings().weight.dtype, model.device
        own = [torch.full((rank,), i) for i, rank in enumerate(ranks)]
        # which of the R an adapter's rows must not have; for the base alone, at the end, all
        self.others = (torch.cat(own) != torch.arange(len(ranks) + 1)[:, None]).to(device)
        self.layers = [(layer, *matrices(layer, self.names, ranks, dtype)) for layer in layers]

    @contextlib.contextmanager
    def rows(self, adapters):
        """Forward passes inside compute row i with adapters[i].

        adapters: N names, "__base__" for none; or their numbers as a tensor [N] on the model's device, which are places
        in `names`, and len(names) for none. A single number is that of all rows.
        """
        if not torch.is_tensor(adapters):
            index = {name: i for i, name in enumerate([*self.names, "__base__"])}
            adapters = torch.tensor([index[name] for name in adapters], device=self.others.device)
        others = self.others[adapters][:, None]
        for layer, a, b in self.layers:
            layer.forward = functools.partial(project, layer.get_base_layer(), a, b, others)
        try:
            yield
        finally:
            for layer, _, _ in self.layers:
                del layer.forward


def project(base, a, b, others, x, **_):  # PEFT leaves hooks that name adapters where one of its passes failed
    """base(x) and what the rows' own adapters add -> [N, T, out].

    x [N, T, in], A [R, in], B [out, R], others [N, 1, R]: true where a rank is another adapter's.
    """
    out = base(x)
    low = (x @ a.t()).masked_fill_(others, 0)
    return out.view(-1, out.shape[-1]).addmm_(low.view(-1, low.shape[-1]), b.t()).view(out.shape)


def matrices(layer, names, ranks, dtype):
    """A [R, in] and B [out, R], scaled, of all adapters of a layer; zero for one that the layer does not have."""
    weight = next(iter(layer.lora_A.values())).weight
    a = torch.zeros(sum(ranks), layer.in_features, dtype=dtype, device=weight.device)
    b = torch.zeros(layer.out_features, sum(ranks), dtype=dtype, device=weight.device)
    with torch.no_grad():
        for name, at, to in zip(names, a.split(ranks), b.split(ranks, 1), strict=True):
            if name in layer.lora_A:
                r = layer.r[name]
                at[:r], to[:, :r] = layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name]
    return a, b


def stackable(model):
    """Whether every adapter of a PEFT model is plain LoRA on linear layers whose weights are where they compute."""
    from peft.tuners.lora import LoraLayer

    layers, every = lora_layers(model), [m for m in model.modules() if isinstance(m, LoraLayer) and m.r]
    saved = any(config.modules_to_save for config in model.peft_config.values())
    return bool(layers) and len(layers) == len(every) and not saved


def lora_layers(model):
    """The LoRA layers of a PEFT model that StackedAdapters can compute."""
    from peft.tuners.lora import Linear, Linear4bit

    def plain(layer):
        biases = any(b.bias is not None for b in layer.lora_B.values())
        return not (layer.lora_variant or layer.merged or biases or layer.get_base_layer().weight.is_meta)

    # PEFT keeps a layer whose last adapter is gone
    return [m for m in model.modules() if isinstance(m, Linear | Linear4bit) and m.r and plain(m)]
