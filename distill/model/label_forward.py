"""Label scores in one forward pass: every label of every prompt, with the prompts' shared prefix computed once.

Rows of one batch may use different adapters of a PEFT model. A model that cannot take a tree mask gets one plain text
per node of the label trie instead.
"""

import inspect
import sys
from collections.abc import Iterator, Sequence

import torch
from transformers import DynamicCache

from distill.model.fp32_logits import fp32_logits
from distill.model.label_trie import LabelTrie
from distill.model.stacked_lora import StackedAdapters, stackable
from distill.model.token_tree import additive, attention_window, tree_batch, tree_mask_unsupported_reason

MAX_ROWS = 128  # of one batch


def token_budget(device: torch.device) -> int:
    """Padded tokens of one batch on this device. The scorer and the server cut their batches at this number."""
    return 2048 if device.type == "cpu" else 16384


def batches(lengths: Sequence[int], budget: int, max_rows: int = MAX_ROWS) -> Iterator[list[int]]:
    """Row numbers in batches of similar length: at most `max_rows` rows and `budget` padded tokens, or one row."""
    batch = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == max_rows or (len(batch) + 1) * lengths[i] > budget):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def shared_prefix(prompts: list[list[int]]) -> list[int]:
    """Token ids with which all `prompts` (token id lists) begin, without the last token of any of them."""
    same = [len(set(column)) == 1 for column in zip(*(ids[:-1] for ids in prompts), strict=False)]
    return prompts[0][: [*same, False].index(False)]


def supports_tree_mask(model) -> bool:
    """Whether `model` computes token trees correctly; tried once per model, with a notice where it does not."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "supports_tree_mask"):
        reason = tree_mask_unsupported_reason(base)
        base.supports_tree_mask = not reason
        if reason:
            print(f"each label is scored in a forward pass of its own: {reason}", file=sys.stderr)
    return base.supports_tree_mask


class LabelForward:
    """Label scores of prompts given as token ids.

    trie: LabelTrie of the labels. prefix: token ids with which the prompts begin; their keys and values are cached, one
    cache per adapter, since LoRA changes both.
    """

    def __init__(self, model, trie: LabelTrie, pad: int, prefix: Sequence[int] = ()):
        self.model, self.trie, self.pad, self.prefix = model, trie, pad, list(prefix)
        self.trees, self.window = supports_tree_mask(model), attention_window(model.config.get_text_config())
        self._caches, self._stack = {}, None

    @torch.inference_mode()
    def scores(self, rows: list[list[int]], adapters: list[str] | None = None) -> torch.Tensor:
        """Length-normalised log-likelihoods [B, L] on the model's device.

        rows: B token id lists. adapters: B adapter names ("__base__" for none), or None for the active adapter.
        """
        n, cache = len(self.prefix), None
        trees = self.trees and max(map(len, rows)) + len(self.trie.nodes) <= self.window
        if trees and n and all(row[:n] == self.prefix for row in rows):
            cache = self._prefix_cache(adapters or [None] * len(rows))
            rows = [row[n:] for row in rows]
        if trees:
            logits = self.logits(rows, cache, n if cache else 0, adapters)
        else:
            logits = self.separate_logits(rows, adapters)
        # in parts: the log-softmax over a large vocabulary takes as much memory as all other activations
        return torch.cat([self.trie.scores(part) for part in logits.split(32)])

    def logits(self, rows: list[list[int]], cache=None, prefix: int = 0, adapters: list[str] | None = None):
        """Logits [B, 1 + M, V] where a label token is predicted, for B token id lists after `prefix` cached tokens."""
        trees = [[(row, -1), *self.trie.after(0, 1)] for row in rows]
        batch, starts = tree_batch(trees, self.pad, prefix)
        # prompt end and nodes stand side by side, so the columns are a range
        keep = torch.tensor([s[0] + len(row) - 1 for s, row in zip(starts, rows, strict=True)])
        batch["logits_to_keep"] = keep[:, None] + torch.arange(1 + len(self.trie.nodes))
        batch = {k: v.to(self.model.device) for k, v in batch.items()}
        batch["attention_mask"] = additive(batch["attention_mask"], self.model.dtype)
        with fp32_logits(self.model):
            return self._forward(adapters, **batch, past_key_values=cache, use_cache=cache is not None).logits

    def separate_logits(self, rows: list[list[int]], adapters: list[str] | None = None) -> torch.Tensor:
        """Like `logits`, for a model without tree masks: each prompt is repeated before each node of the trie.

        Only the last token of each text gets logits: with a vocabulary of 262,144 those of all tokens of one batch
        would take 8 GiB.
        """
        paths = [[]]
        for ids, parent in self.trie.nodes:
            paths.append([*paths[parent + 1], *ids])
        texts = [row + path for row in rows for path in paths]
        width = max(map(len, texts))
        ids = torch.tensor([text + [self.pad] * (width - len(text)) for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
        batch = {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
        names = [a for a in adapters for _ in paths] if adapters else None
        last = torch.tensor([[len(text) - 1] for text in texts], device=self.model.device)
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if "logits_to_keep" in inspect.signature(base.forward).parameters:
            batch["logits_to_keep"] = last
        with fp32_logits(self.model):
            logits = self._forward(names, **batch, use_cache=False).logits
        if "logits_to_keep" not in batch:
            logits = logits.take_along_dim(last[..., None], 1)
        return logits.view(len(rows), len(paths), -1)

    def _forward(self, adapters: list[str] | None, **batch):
        """The model's output, row i with adapters[i]; without names, with the active adapter."""
        if not adapters:
            return self.model(**batch)
        if self._stack is None:
            self._stack = StackedAdapters(self.model) if stackable(self.model) else False
        if not self._stack:  # DoRA, embeddings and the like: PEFT's own mixed batches, slower
            return self.model(**batch, adapter_names=adapters)
        with self._stack.rows(adapters):
            return self.model.get_base_model()(**batch)

    def _prefix_cache(self, adapters: list[str | None]) -> DynamicCache:
        """Keys and values of the prefix for each row, computed once per adapter."""
        for name in set(adapters) - set(self._caches):
            ids = torch.tensor([self.prefix], device=self.model.device)
            names = [name] if name else None
            cache = self._forward(names, input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
            self._places = [(part.shape[1:], part.device) for part in parts]  # a large model lies on several devices
            self._caches[name] = torch.cat([part.flatten().to(self.model.device) for part in parts])
        own = list(dict.fromkeys(adapters))
        caches = torch.stack([self._caches[a] for a in own])
        if len(own) > 1:  # one kernel for all layers; rows of one adapter need none
            caches = caches[torch.tensor([own.index(a) for a in adapters], device=caches.device)]
        parts = caches.expand(len(adapters), -1).split([shape.numel() for shape, _ in self._places], 1)
        parts = [part.unflatten(1, shape).to(on) for part, (shape, on) in zip(parts, self._places, strict=True)]
        return DynamicCache(list(zip(parts[::2], parts[1::2], strict=True)))
