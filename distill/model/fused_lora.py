"""Decoder layers with LoRA in fewer kernels and less memory: a projection with its adapter is one autograd function,
and so is a gated MLP, which keeps nothing of its inner width for the backward pass.

What PEFT computes for a projection, twelve kernels forward with three copies of the output, is three matrix products
here. The MLP works through its tokens in chunks and computes gate and up again in its backward pass, so that memory per
token is that of the hidden width. Under activation checkpointing, recomputation then stops before the MLP.

Dropout of the adapter drops whole input features, one draw a micro-batch (Gal and Ghahramani 2016), instead of single
values: it then is a mask on A and costs nothing a token.
"""

import types

import torch
from torch.nn.functional import linear

CHUNK = 4096  # tokens of an MLP at once


def fuse(model):
    """Give LoRA projections, gated MLPs and RMS norms of a PEFT model the forward passes below; how many of each.

    Others, and any pass with the adapter off or another one on, keep their own.
    """
    from peft.tuners.lora import LoraLayer

    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and fusable(m)]
    mlps = [m for m in model.modules() if gated(m) and all(p in layers for p in projections(m))]
    for layer in layers:
        layer.forward = types.MethodType(project, layer)
    for mlp in mlps:
        mlp.forward = types.MethodType(gated_mlp, mlp)
    return len(layers), len(mlps), fuse_norms(model)


def fuse_norms(model):
    """One kernel instead of eight for each RMS norm of any model; how many."""
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm") and is_rms_norm(m)]
    for norm in norms:
        norm.forward = types.MethodType(rms_norm, norm)
    return len(norms)


def fusable(layer):
    """Whether a PEFT layer is one plain LoRA adapter on a linear layer in 4, 16 or 32 bits.

    A weight on meta is offloaded: accelerate's own forward pass brings it in.
    """
    from bitsandbytes.nn import Linear4bit

    base = layer.get_base_layer()
    if type(base) not in (torch.nn.Linear, Linear4bit) or base.weight.is_meta or packed(base):
        return False
    return not layer.lora_variant and "default" in layer.lora_A and layer.lora_B["default"].bias is None


def packed(base):
    """Whether bitsandbytes has rewritten a 4-bit weight for its CPU kernel, which has no gradient of the input."""
    return getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False)


def gated(module):
    return all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))


def projections(mlp):
    return mlp.gate_proj, mlp.up_proj, mlp.down_proj


def is_rms_norm(norm):
    """Whether a module is weight * x / rms(x) as torch computes it; Gemma's, for one, adds 1 to the weight."""
    weight = getattr(norm, "weight", None)
    if not hasattr(norm, "variance_epsilon") or weight is None or weight.is_meta or hasattr(norm, "_hf_hook"):
        return False
    with torch.no_grad():
        x = torch.linspace(-1, 2, norm.weight.numel(), device=norm.weight.device, dtype=norm.weight.dtype)[None]
        return torch.allclose(norm(x), rms_norm(norm, x), rtol=2e-2, atol=1e-3)


def rms_norm(norm, x):
    with torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.variance_epsilon)


def as_peft(layer):
    return layer.disable_adapters or layer.merged or layer.active_adapters != ["default"]


def project(layer, x, *args, **kwargs):
    """The forward pass of a LoRA projection: x [..., in] -> [..., out]."""
    if as_peft(layer) or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    base = layer.get_base_layer()
    return LoraLinear.apply(x, *adapter(layer, x, feature_mask(layer, x)), base, layer.scaling["default"])


def gated_mlp(mlp, x):
    """The forward pass of down(act(gate(x)) * up(x)): x [..., hidden] -> [..., hidden]."""
    gate, up, down = projections(mlp)
    if as_peft(gate) or any(p._forward_pre_hooks for p in (gate, up, down)):  # a hook brings PEFT's adapter_names
        return type(mlp).forward(mlp, x)
    outer, inner = feature_mask(gate, x), feature_mask(down, x)
    matrices = (*adapter(gate, x, outer), *adapter(up, x, outer), *adapter(down, x, inner))
    kept = []
    return GatedMlp.apply(*Keep.apply(kept, x, *matrices), mlp, kept)


def feature_mask(layer, x):
    """What dropout leaves of the input features [in], scaled; None when nothing is dropped."""
    p = getattr(layer.lora_dropout["default"], "p", 0.0) if layer.training else 0.0
    if not p:
        return None
    kept = torch.empty(layer.get_base_layer().in_features, device=x.device, dtype=torch.float32)
    return kept.bernoulli_(1 - p).div_(1 - p)


def adapter(layer, x, mask):
    """A [r, in] and B [out, r] as x computes; the gradient of the cast and of the mask is autograd's."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return (a if mask is None else a * mask).to(x.dtype), b.to(x.dtype)


def dense(base, dtype):
    """(weight [out, in], bias) of a linear layer in `dtype`, dequantised where it is in 4 bits."""
    weight, bias = base.weight, base.bias
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, state)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def lora(x, weight, bias, a, b, scaling):
    """x [T, in] -> (x W' + bias + scaling (x A') B' [T, out], x A' [T, r])."""
    low = x @ a.t()
    return linear(x, weight, bias).addmm_(low, b.t(), alpha=scaling), low


def lora_backward(grad, x, low, weight, a, b, scaling):
    """Gradients of x [T, in], A [r, in] and B [out, r] from that of the output [T, out]."""
    grad_low = (grad @ b).mul_(scaling)
    return (grad @ weight).addmm_(grad_low, a), grad_low.t() @ x, (grad.t() @ low).mul_(scaling)


class LoraLinear(torch.autograd.Function):
    """A linear layer with its adapter; kept for the backward pass are x and x A'."""

    @staticmethod
    def forward(ctx, x, a, b, base, scaling):
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1])
            out, low = lora(flat, *dense(base, x.dtype), a, b, scaling)
        ctx.save_for_backward(x, low, a, b)
        ctx.base, ctx.scaling = base, scaling
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, low, a, b = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            weight, _ = dense(ctx.base, x.dtype)
            grad, flat = grad.to(x.dtype).reshape(-1, weight.shape[0]), x.reshape(-1, x.shape[-1])
            grad_x, grad_a, grad_b = lora_backward(grad, flat, low, weight, a, b, ctx.scaling)
        return grad_x.view(x.shape), grad_a, grad_b, None, None


class Keep(torch.autograd.Function):
    """Saves GatedMlp's inputs ahead of it, so that a checkpoint's recomputation ends before the MLP."""

    @staticmethod
    def forward(ctx, kept, *tensors):
        ctx.save_for_backward(*tensors)
        kept.append(ctx)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *grads):
        return None, *grads


class GatedMlp(torch.autograd.Function):
    """down(act(gate(x)) * up(x)) with adapters, chunk by chunk; keeps nothing itself (Keep does)."""

    @staticmethod
    def forward(ctx, x, gate_a, gate_b, up_a, up_b, down_a, down_b, mlp, kept):
        ctx.mlp, ctx.kept = mlp, kept
        with torch.autocast(x.device.type, enabled=False):
            weights = [dense(p.get_base_layer(), x.dtype) for p in projections(mlp)]
            scales = [p.scaling["default"] for p in projections(mlp)]
            out = x.new_empty(x.shape).view(-1, x.shape[-1])
            for part, to in zip(x.reshape(-1, x.shape[-1]).split(CHUNK), out.split(CHUNK), strict=True):
                gate, _ = lora(part, *weights[0], gate_a, gate_b, scales[0])
                up, _ = lora(part, *weights[1], up_a, up_b, scales[1])
                to.copy_(lora(mlp.act_fn(gate).mul_(up), *weights[2], down_a, down_b, scales[2])[0])
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        x, *matrices = ctx.kept[0].saved_tensors
        gate_a, gate_b, up_a, up_b, down_a, down_b = matrices
        mlp = ctx.mlp
        with torch.autocast(x.device.type, enabled=False):
            weights = [dense(p.get_base_layer(), x.dtype) for p in projections(mlp)]
            scales = [p.scaling["default"] for p in projections(mlp)]
            sums = [torch.zeros_like(m, dtype=torch.float32) for m in matrices]
            out = x.new_empty(x.shape).view(-1, x.shape[-1])
            parts = (t.reshape(-1, t.shape[-1]).split(CHUNK) for t in (x, grad.to(x.dtype), out))
            for part, grad_part, to in zip(*parts, strict=True):
                gate, gate_low = lora(part, *weights[0], gate_a, gate_b, scales[0])
                up, up_low = lora(part, *weights[1], up_a, up_b, scales[1])
                with torch.enable_grad():
                    gate, up = gate.requires_grad_(), up.requires_grad_()
                    inner = mlp.act_fn(gate) * up
                own = inner.detach()
                grad_inner, *downs = lora_backward(
                    grad_part, own, own @ down_a.t(), weights[2][0], down_a, down_b, scales[2]
                )
                grad_gate, grad_up = torch.autograd.grad(inner, (gate, up), grad_inner)
                del inner, own, gate, up, grad_inner
                to_x, *gates = lora_backward(grad_gate, part, gate_low, weights[0][0], gate_a, gate_b, scales[0])
                more, *ups = lora_backward(grad_up, part, up_low, weights[1][0], up_a, up_b, scales[1])
                to.copy_(to_x.add_(more))
                for total, one in zip(sums, (*gates, *ups, *downs), strict=True):
                    total += one
        ctx.kept.clear()
        return out.view(x.shape), *(s.to(x.dtype) for s in sums), None, None
