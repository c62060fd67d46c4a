"""KD of free text: a trainer whose loss is on a teacher's top-k log-probs at every token (teacher_topk.py)."""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint
from trl import SFTTrainer

from distill.model.token_tree import additive, pack_rows
from distill.train.teacher_topk import TopK
from distill.train.trainer import StudentTrainer

TARGETS = ("target", "top_ids", "top_logp")  # what pack_tokens adds to the model's inputs


def pack_tokens(rows: list[dict], top_k: TopK, pad: int) -> dict[str, torch.Tensor]:
    """One micro-batch: packed model inputs, and TARGETS in the order of the logits.

    rows: {"input_ids", "labels", "row"}; top_k[row]: (ids, logp) of that row's trained tokens. pad: its token id.
    """
    ids, first = [r["input_ids"] for r in rows], [r["labels"].count(-100) for r in rows]
    batch, columns = pack_rows(ids, [n - 1 for n in first], pad)
    at = torch.cat([own[n - 1 : -1] for own, n in zip(columns, first, strict=True)])
    target = torch.cat([torch.tensor(row[n:]) for row, n in zip(ids, first, strict=True)])
    top_ids, logp = map(torch.cat, zip(*(top_k[r["row"]] for r in rows), strict=True))
    keep = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool)
    keep[at] = True
    order = at.argsort()
    batch["logits_to_keep"] = keep.view(batch["input_ids"].shape)
    return batch | dict(zip(TARGETS, (target[order], top_ids[order], logp[order]), strict=True))


def summed_loss(model, batch: dict[str, torch.Tensor], loss: Callable) -> torch.Tensor:
    """Sum of loss(logits, target, top_ids, top_logp) over the tokens of a packed micro-batch, its mask additive.

    The backward pass makes the fp32 copies of a part of the logits again: all of them at once are too large.
    """
    targets = [batch.pop(name) for name in TARGETS]
    logits = model(**batch, use_cache=False).logits.flatten(0, -2)
    parts = zip(*(x.split(256) for x in (logits, *targets)), strict=True)
    return sum(checkpoint(loss, *part, use_reentrant=False) for part in parts)


@torch.inference_mode()
def mean_loss(model, rows: list[dict], top_k: TopK, loss: Callable) -> float:
    """Mean loss per trained token of encoded rows under a loaded model, one row at a time. loss: as TokenTrainer's."""
    total, tokens = 0.0, 0
    for row in rows:
        ids, n = torch.tensor(row["input_ids"], device=model.device), row["labels"].count(-100)
        logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=len(ids) - n + 1).logits[0, :-1]
        targets = [x.to(model.device) for x in (ids[n:], *top_k[row["row"]])]
        for part in zip(*(x.split(256) for x in (logits, *targets)), strict=True):
            total += float(loss(*part))
        tokens += len(ids) - n
    return total / tokens


class TokenTrainer(StudentTrainer, SFTTrainer):
    """Logits only at trained tokens, common prefixes once.

    Rows: {"input_ids", "labels", "row"}. loss(logits [T, V], target [T], top_ids [T, k], top_logp [T, k + 1]) is a sum
    over tokens (token_loss of kd_train.py).
    """

    needs_tree_mask = True

    def __init__(self, *args, top_k: TopK, loss: Callable, **kwargs):
        self.top_k, self.loss = top_k, loss
        super().__init__(*args, data_collator=self.collate, **kwargs)

    def collate(self, rows):
        batch = pack_tokens(rows, self.top_k, self.processing_class.pad_token_id)
        # the Trainer counts the tokens of a step by these names
        return batch | {"labels": batch["target"], "shift_labels": batch["target"]}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels")}
        inputs["attention_mask"] = additive(inputs["attention_mask"], self.model.dtype)
        tokens = len(inputs["target"])
        loss = summed_loss(model, inputs, self.loss)
        if num_items_in_batch is None:
            return loss / tokens
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss * ranks / num_items_in_batch
