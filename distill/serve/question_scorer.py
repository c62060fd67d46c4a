"""Scores of typed questions about a text: questions are branches after the text, and options a trie after each.

A text with all its questions is one token tree, so it costs one forward pass and the text is computed once. Each
question sees the text and itself, as if it had been asked alone. Options may have several tokens.
"""

import json
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from distill.files import sha256
from distill.model.label_forward import LabelForward, batches, shared_prefix, token_budget
from distill.model.label_trie import LabelTrie

PRIORS = 4096  # that are kept, one per adapter and question


class Branch(NamedTuple):
    """A question as it is scored. text: what stands after the state in its prompt, which names it in the cache.

    ids: tokens of the prompt after those that the questions share. options: tokens of each option, none a prefix of
    another.
    """

    text: str
    ids: list[int]
    options: list[list[int]]


class QuestionScorer:
    """Scores and priors of typed questions. Belongs to one state of the model, like its forward pass.

    null_prompts: a question's text -> the token ids of its content-free prompts, whose mean score is its prior (Zhao et
    al. 2021). A prior is computed when a question is first asked, and kept.
    """

    def __init__(self, forward: LabelForward, null_prompts: Callable[[str], list[list[int]]]):
        self.forward, self.null_prompts = forward, null_prompts
        self.priors: OrderedDict[str, np.ndarray] = OrderedDict()

    def answers(
        self, rows: list[tuple[list[int], list[Branch]]], adapters: list[str] | None = None
    ) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """(scores [options], prior [options]) of each question of each row, in one forward pass.

        rows: B pairs (token ids that the row's questions share, its questions). adapters: B adapter names ("__base__"
        for none), or None for the active adapter. Scores are length-normalised log-likelihoods, as of LabelScorer.
        """
        names = adapters or [None] * len(rows)
        keys = [[prior_key(name, b) for b in own] for (_, own), name in zip(rows, names, strict=True)]
        asked = [(name, b) for (_, own), name in zip(rows, names, strict=True) for b in own]
        used = [key for own in keys for key in own]
        self._fill_priors(dict(zip(used, asked, strict=True)))
        found = [
            [(score, self.priors[key]) for score, key in zip(scores, own, strict=True)]
            for scores, own in zip(self.scores(rows, adapters), keys, strict=True)
        ]
        for key in used:
            self.priors.move_to_end(key)
        while len(self.priors) > PRIORS:
            self.priors.popitem(last=False)
        return found

    @torch.inference_mode()
    def scores(
        self, rows: list[tuple[list[int], list[Branch]]], adapters: list[str] | None = None
    ) -> list[list[np.ndarray]]:
        """Scores [options] of each question of each row; arguments as `answers`."""
        trees, segments, tries = [], [], []
        for prefix, branches in rows:
            tree, own = [(prefix, -1)] if prefix else [], []
            tries.append([LabelTrie(branch.options) for branch in branches])
            for branch, trie in zip(branches, tries[-1], strict=True):
                at = len(tree)
                tree += [(branch.ids, 0 if prefix else -1), *trie.after(at, at + 1)]
                own += range(at, at + 1 + len(trie.nodes))
            trees.append(tree)
            segments.append(own)
        found = []
        for logits, own in zip(self.forward.tree_logits(trees, segments, adapters), tries, strict=True):
            parts = logits.split([1 + len(trie.nodes) for trie in own])
            found.append([trie.scores(p[None])[0].cpu().numpy() for trie, p in zip(own, parts, strict=True)])
        return found

    def _fill_priors(self, asked: dict[str, tuple[str | None, Branch]]) -> None:
        """Compute the priors that are not known yet. asked: key -> (adapter, question)."""
        new = {key: value for key, value in asked.items() if key not in self.priors}
        rows, names = [], [name for name, _ in new.values()]
        for _, branch in new.values():
            prompts = self.null_prompts(branch.text)
            shared = shared_prefix(prompts)
            rows.append((shared, [branch._replace(ids=ids[len(shared) :]) for ids in prompts]))
        keys, lengths = list(new), [len(shared) + sum(map(width, own)) for shared, own in rows]
        for batch in batches(lengths, token_budget(self.forward.model.device)):
            own = [names[i] for i in batch] if names[0] else None
            for i, scores in zip(batch, self.scores([rows[i] for i in batch], own), strict=True):
                self.priors[keys[i]] = np.mean(scores, axis=0)


def width(branch: Branch) -> int:
    """Tokens of a question in its tree: its own and the nodes of its options."""
    return len(branch.ids) + len(LabelTrie(branch.options).nodes)


def prior_key(adapter: str | None, branch: Branch) -> str:
    """A question of an adapter, as short as it can be: texts of clients are not kept."""
    return sha256(json.dumps([adapter, branch.text, branch.options]))
