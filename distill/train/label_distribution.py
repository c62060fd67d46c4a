"""KD of a label task: a trainer whose loss is on the scores of all labels, as inference ranks by them."""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint
from trl import SFTTrainer

from distill.model.fp32_logits import fp32_logits
from distill.model.label_trie import LabelTrie
from distill.model.token_tree import additive, pack_prompts
from distill.train.trainer import StudentTrainer


class LabelTrainer(StudentTrainer, SFTTrainer):
    """The prompts of a batch share their prefix, the labels their prompt.

    Rows: {"prompt_ids", "teacher", "gold"}. trie: of the task's labels. loss(scores [N, L], teacher [N, L], gold [N])
    is a mean over rows (distribution_loss of kd_train.py).
    """

    needs_tree_mask = True

    def __init__(self, *args, trie: LabelTrie, loss: Callable, **kwargs):
        self.trie, self.loss = trie, loss
        super().__init__(*args, data_collator=self.collate, **kwargs)

    def collate(self, rows):
        batch = pack_prompts([r["prompt_ids"] for r in rows], self.trie, self.processing_class.pad_token_id)
        batch["teacher"] = torch.tensor([r["teacher"] for r in rows])
        batch["gold"] = torch.tensor([r["gold"] for r in rows])
        return batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        teacher, gold, at = inputs.pop("teacher"), inputs.pop("gold"), inputs.pop("label_logits_at")
        inputs["attention_mask"] = additive(inputs["attention_mask"], self.model.dtype)
        with fp32_logits(self.model):
            logits = model(**inputs, use_cache=False).logits.flatten(0, -2)[at]
        # The backward pass computes the log-softmax again, a part at a time: all at once is too large. Rows are
        # selected before the split: selected in each part, their gradient would be as large as all logits.
        parts = [checkpoint(self.trie.scores, part, use_reentrant=False) for part in logits.split(32)]
        return self.loss(torch.cat(parts), teacher, gold)
