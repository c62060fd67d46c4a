"""Label scores in one forward pass: every label of every prompt, with the prompts' shared prefix computed once.

Rows of one batch may use different adapters of a PEFT model. A model that cannot take a tree mask gets one plain text
per node of the label trie instead.
"""

import functools
import inspect
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from transformers import DynamicCache

from distill.model.fp32_logits import fp32_logits
from distill.model.label_graph import Inputs, LabelGraphs, stepped_shapes
from distill.model.label_trie import LabelTrie
from distill.model.stacked_lora import StackedAdapters, lora_layers, stackable
from distill.model.token_tree import additive, attention_window, path_ids, tree_batch, tree_mask_unsupported_reason

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
    cache per adapter, since LoRA changes both. On a GPU small passes are replayed from CUDA graphs.
    """

    def __init__(self, model, trie: LabelTrie, pad: int, prefix: Sequence[int] = ()):
        self.model, self.trie, self.pad, self.prefix = model, trie.to(model.device), pad, list(prefix)
        self.trees, self.window = supports_tree_mask(model), attention_window(model.config.get_text_config())
        # a row of the caches for each adapter, the base and, last, whichever adapter is active
        names = [*getattr(model, "peft_config", ()), "__base__", None]
        self._numbers, self._caches, self._cached = {name: i for i, name in enumerate(names)}, None, set()
        self.graphs = LabelGraphs(model)

    @functools.cached_property
    def stack(self) -> StackedAdapters | None:
        """The adapters side by side; None for DoRA, embeddings and the like."""
        return StackedAdapters(self.model) if stackable(self.model) else None

    @functools.cached_property
    def active(self) -> str | None:
        """The active adapter where it can be computed side by side with others, in fewer kernels than by PEFT."""
        if not (self.trees and hasattr(self.model, "peft_config")) or torch.distributed.is_initialized():
            return None  # FSDP lends a layer's weights only while that layer's own module runs
        from distill.model.active_adapter import adapters_off

        names, layers = self.model.active_adapters, lora_layers(self.model)
        fused = any("forward" in vars(layer) for layer in layers)  # in training; they take few kernels as they are
        if len(names) != 1 or adapters_off(self.model) or fused:
            return None
        return names[0] if self.stack else None

    @torch.inference_mode()
    def scores(self, rows: list[list[int]], adapters: list[str] | None = None) -> torch.Tensor:
        """Length-normalised log-likelihoods [B, L] on the model's device.

        rows: B token id lists. adapters: B adapter names ("__base__" for none), or None for the active adapter.
        """
        adapters = adapters or (self.active and [self.active] * len(rows))
        n, width = len(self.prefix), max(map(len, rows)) + len(self.trie.nodes)
        if not self.trees or width > self.window:
            return self._label_scores(self.separate_logits(rows, adapters))
        cached = n > 0 and all(row[:n] == self.prefix for row in rows)
        if cached:
            rows = [row[n:] for row in rows]
            self._cache_prefix(adapters or [None])
        compute = functools.partial(self.tree_scores, adapters=adapters, cached=cached)
        if adapters and not self.stack and self.graphs.enabled:
            self.graphs.disable("its adapters are not plain LoRA")
        if key := self.graphs.key(len(rows), width - n * cached, adapters is None, cached):
            found = self.graphs.scores(key, self.inputs(rows, adapters, n * cached, key[1]), compute)
            if found is not None:
                return found
        inputs = self.inputs(rows, adapters, n * cached)
        return compute({name: t.to(self.model.device) for name, t in inputs.items()})

    def record(self, shortest: int, longest: int, adapters: list[str] | None, seconds: float) -> int:
        """Record passes of prompts between two lengths, in tokens, before they come -> how many.

        adapters: names that the prompts will use, or None for the active one. Nothing more is begun after `seconds`.
        """
        if not (self.trees and self.graphs.enabled):
            return 0
        until, before, patience = time.monotonic() + seconds, len(self.graphs), self.graphs.patience
        n, nodes = len(self.prefix), len(self.trie.nodes)
        shortest, longest = (max(1, tokens - n) + nodes for tokens in (shortest, longest))
        self.graphs.patience = 0
        for rows, width in stepped_shapes(shortest, longest):
            if time.monotonic() >= until:
                break
            prompt = self.prefix + [self.pad] * (min(width, longest) - nodes)
            self.scores([prompt] * rows, adapters and [adapters[i % len(adapters)] for i in range(rows)])
        self.graphs.patience = patience
        return len(self.graphs) - before

    def inputs(self, rows: list[list[int]], adapters: list[str] | None, prefix: int, multiple: int = 1) -> Inputs:
        """What tree_scores takes for B token id lists after `prefix` cached tokens, on the CPU.

        The tensors of tree_batch, W a multiple of `multiple`; "logits_to_keep" [B, 1 + M], where a label token is
        predicted; "adapters" [B], the adapters' numbers, or [1] where the rows share one.
        """
        trees = [[(row, -1), *self.trie.after(0, 1)] for row in rows]
        batch, starts = tree_batch(trees, self.pad, prefix, multiple)
        # prompt end and nodes stand side by side, so the columns are a range
        keep = torch.tensor([s[0] + len(row) - 1 for s, row in zip(starts, rows, strict=True)])
        names = adapters or [None]
        own = [self._numbers[name] for name in (names if len(set(names)) > 1 else names[:1])]
        return batch | {
            "logits_to_keep": keep[:, None] + torch.arange(1 + len(self.trie.nodes)),
            "adapters": torch.tensor(own),
        }

    def tree_scores(self, inputs: Inputs, adapters: list[str] | None, cached: bool) -> torch.Tensor:
        """Scores [B, L] from inputs() on the model's device; nothing here may wait for the device."""
        batch = dict(inputs)
        numbers, see = batch.pop("adapters"), batch.pop("attention_mask")
        batch["attention_mask"] = additive(see, self.model.dtype)
        cache = self._prefix_cache(numbers, len(see)) if cached else None
        with fp32_logits(self.model):
            out = self._forward(adapters, numbers, **batch, past_key_values=cache, use_cache=cached)
        return self._label_scores(out.logits)

    def _label_scores(self, logits: torch.Tensor) -> torch.Tensor:
        # in parts: the log-softmax over a large vocabulary takes as much memory as all other activations
        return torch.cat([self.trie.scores(part) for part in logits.split(32)])

    def separate_logits(self, rows: list[list[int]], adapters: list[str] | None = None) -> torch.Tensor:
        """Logits [B, nodes + 1, V] that predict the label tokens, for a model without tree masks.

        Each prompt is repeated before each node of the trie. Only the last token of each text gets logits: with a
        vocabulary of 262,144 those of all tokens of one batch would take 8 GiB.
        """
        paths = [[]]
        for ids, parent in self.trie.nodes:
            paths.append([*paths[parent + 1], *ids])
        names = [a for a in adapters for _ in paths] if adapters else None
        return self.last_logits([row + path for row in rows for path in paths], names).view(len(rows), len(paths), -1)

    def tree_logits(
        self, trees: list[list[tuple[list[int], int]]], segments: list[list[int]], adapters: list[str] | None = None
    ) -> list[torch.Tensor]:
        """Logits after the last token of chosen segments of B token trees (tree_batch): B tensors [K, V].

        segments: the numbers of the K segments of each tree. A model without tree masks gets their paths as texts.
        """
        widest = max(sum(len(ids) for ids, _ in tree) for tree in trees)
        if not self.trees or widest > self.window:
            names = adapters or [None] * len(trees)
            return [self.path_logits(*one) for one in zip(trees, segments, names, strict=True)]
        batch, starts = tree_batch(trees, self.pad)
        ends = [
            [at[s] + len(tree[s][0]) - 1 for s in own] for tree, own, at in zip(trees, segments, starts, strict=True)
        ]
        most = max(map(len, ends))
        batch["logits_to_keep"] = torch.tensor([own + own[:1] * (most - len(own)) for own in ends])
        batch = {k: v.to(self.model.device) for k, v in batch.items()}
        batch["attention_mask"] = additive(batch["attention_mask"], self.model.dtype)
        with fp32_logits(self.model):
            logits = self._forward(adapters, None, **batch, use_cache=False).logits
        return [part[: len(own)] for part, own in zip(logits, ends, strict=True)]

    def path_logits(self, tree: list[tuple[list[int], int]], segments: list[int], adapter: str | None) -> torch.Tensor:
        """Like `tree_logits` for one tree, from a text per segment: the path to it."""
        texts, found = [path_ids(tree, s) for s in segments], {}
        for rows in batches([len(text) for text in texts], token_budget(self.model.device)):
            logits = self.last_logits([texts[i] for i in rows], [adapter] * len(rows) if adapter else None)
            found |= zip(rows, logits, strict=True)
        return torch.stack([found[i] for i in range(len(texts))])

    def last_logits(self, texts: list[list[int]], adapters: list[str] | None = None) -> torch.Tensor:
        """Logits [N, V] after the last token of each text (token id list)."""
        width = max(map(len, texts))
        ids = torch.tensor([text + [self.pad] * (width - len(text)) for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
        batch = {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
        last = torch.tensor([[len(text) - 1] for text in texts], device=self.model.device)
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if "logits_to_keep" in inspect.signature(base.forward).parameters:
            batch["logits_to_keep"] = last
        with fp32_logits(self.model):
            logits = self._forward(adapters, None, **batch, use_cache=False).logits
        if "logits_to_keep" not in batch:
            logits = logits.take_along_dim(last[..., None], 1)
        return logits[:, 0]

    def _forward(self, adapters: list[str] | None, numbers: torch.Tensor | None, **batch):
        """The model's output, row i with adapters[i] or their numbers; without names, with the active adapter."""
        if not adapters:
            return self.model(**batch)
        if not self.stack:  # PEFT's own mixed batches, slower
            return self.model(**batch, adapter_names=adapters)
        with self.stack.rows(adapters if numbers is None else numbers):
            return self.model.get_base_model()(**batch)

    def _cache_prefix(self, adapters: list[str | None]) -> None:
        """Compute the keys and values of the prefix for adapters that have none yet."""
        for name in set(adapters) - self._cached:
            ids = torch.tensor([self.prefix], device=self.model.device)
            names = [name] if name else None
            cache = self._forward(names, None, input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
            self._places = [(part.shape[1:], part.device) for part in parts]  # a large model lies on several devices
            flat = torch.cat([part.flatten().to(self.model.device) for part in parts])
            if self._caches is None:
                self._caches = flat.new_zeros(len(self._numbers), len(flat))
            self._caches[self._numbers[name]] = flat
            self._cached.add(name)

    def _prefix_cache(self, numbers: torch.Tensor, rows: int) -> DynamicCache:
        """Keys and values of the prefix for each row, by the adapters' numbers."""
        caches = self._caches[numbers].expand(rows, -1)  # one kernel for all layers
        parts = caches.split([shape.numel() for shape, _ in self._places], 1)
        parts = [part.unflatten(1, shape).to(on) for part, (shape, on) in zip(parts, self._places, strict=True)]
        return DynamicCache(list(zip(parts[::2], parts[1::2], strict=True)))
