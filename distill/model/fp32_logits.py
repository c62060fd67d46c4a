"""Logits in 32 bits from a head in 16, where a label is scored.

In bf16 the logits between 16 and 32 lie 0.125 apart, so a row's score moved by up to 0.2 nat with the batch that it
shared (embedded student). The product of head and hidden state is summed in fp32 anyway; here it stays so.
"""

import contextlib

import torch


@contextlib.contextmanager
def fp32_logits(model):
    """Within it `model` gives fp32 logits. A head that is no plain matrix in 16 bits keeps its own way."""
    head = model.get_output_embeddings()
    plain = type(head) is torch.nn.Linear and head.bias is None and not hasattr(head, "_hf_hook")
    if not plain or head.weight.is_meta or head.weight.dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    head.forward = lambda x: WideLinear.apply(x.to(head.weight.dtype), head.weight)  # FSDP lends the weight for a pass
    try:
        yield
    finally:
        del head.forward


class WideLinear(torch.autograd.Function):
    """x [..., H] times a frozen weight [V, H], both in 16 bits -> fp32 [..., V]."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        rows = x.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            if x.device.type == "cuda":
                out = torch.mm(rows, weight.T, out_dtype=torch.float32)
            else:  # other devices have no such product: 32-bit copies of the weight, a part at a time
                out = torch.cat([rows.float() @ part.float().T for part in weight.split(16384)], -1)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            return grad.to(weight.dtype) @ weight, None
