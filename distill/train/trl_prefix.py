"""The one patch of TRL's forward pass: rows with a common prefix compute it once."""

import functools

import torch

from distill.model.token_tree import additive, pack_rows


def share_prefixes(model, pad: int, group: int | None = None) -> None:
    """Replace model.forward by one that computes common prefixes once, with the same loss and gradients.

    TRL calls model(input_ids, attention_mask, labels, fused_lm_head=True) with N padded rows and reads per-token
    values [N, T - 1]. Here each `group` of rows becomes one token tree (the task's prefix once for all, a prompt once
    for chosen and rejected), and the values are put back where TRL expects them. Other calls are left as they are.
    pad: token id of padding.
    """
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args, **kwargs):
        if not kwargs.get("fused_lm_head"):
            return plain(*args, **kwargs)
        input_ids, labels, attention = (kwargs.pop(k) for k in ("input_ids", "labels", "attention_mask"))
        lengths, targets = attention.sum(1).tolist(), labels.tolist()
        rows = [ids[:n] for ids, n in zip(input_ids.tolist(), lengths, strict=True)]
        # the token before the first trained one predicts it, so each row keeps its own
        limits = [
            next((i for i, t in enumerate(row) if t != -100), n) - 1 for row, n in zip(targets, lengths, strict=True)
        ]
        batch, columns = pack_rows(rows, limits, pad, group)
        target = torch.full((batch["input_ids"].numel(),), -100)
        source = torch.zeros(len(rows), input_ids.shape[1] - 1, dtype=torch.long)
        for i, own in enumerate(columns):
            source[i, : len(own) - 1] = own[:-1]
            target[own[limits[i] : -1]] = torch.tensor(targets[i][limits[i] + 1 : lengths[i]])
        target = target.view(batch["input_ids"].shape)
        batch = {k: v.to(input_ids.device) for k, v in batch.items()}
        batch["attention_mask"] = additive(batch["attention_mask"], model.dtype)
        target, source, mask = target.to(labels.device), source.to(labels.device), labels[:, 1:] != -100
        if input_ids.device.type == "cpu":  # TRL's head computes the trained positions only on a GPU
            del kwargs["fused_lm_head"]
            out = trained_positions(plain(*args, **kwargs, **batch, logits_to_keep=target != -100).logits, target)
        else:
            out = plain(*args, **kwargs, **batch, labels=target, shift_labels=target)
        for name in ("log_probs", "entropy", "is_top1", "mean_logits", "log_sum_sq_probs"):
            if getattr(out, name) is not None:
                out[name] = out[name].flatten()[source] * mask
        out["label_mask"] = mask
        return out

    model.forward = forward


def trained_positions(logits: torch.Tensor, target: torch.Tensor):
    """TRL's FusedCausalLMOutput from the logits [K, V] of the K positions whose target [B, T] is not -100."""
    from trl.trainer.utils import FusedCausalLMOutput

    keep = target != -100
    logp = logits.float().log_softmax(-1)
    values = {
        "log_probs": logp.gather(1, target[keep][:, None])[:, 0],
        "entropy": -(logp.detach().exp() * logp.detach()).sum(-1),
        "mean_logits": logits.detach().float().mean(-1),
        "is_top1": logits.argmax(-1) == target[keep],
    }
    values = {k: v.new_zeros(target.shape).masked_scatter(keep, v) for k, v in values.items()}
    return FusedCausalLMOutput(**values, label_mask=keep)
