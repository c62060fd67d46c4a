"""Token trees: a prefix that several texts share is computed once, for scoring and for training.

A tree is a list of segments (token ids, parent). Packed into one sequence, each token attends to its ancestors only and
its position is its depth, so that every path gives the same result as its text alone. Labels after a prompt are
such a tree (LabelTrie), and so are the rows of a task after their common prefix, or chosen and rejected after their
prompt (share_prefixes).
"""

import numpy as np
import torch

from distill.files import one_line

GROUP = 20  # rows a tree: more share more, but attention looks at all of a tree's tokens (tests/bench_train.py)


def tree_batch(trees, pad, head=0, multiple=1):
    """Token trees as one right-padded batch: each token sees its ancestors, and its position is its depth.

    trees: B lists of segments (token ids, parent): the ids follow the last token of segment number `parent`, an
    earlier one, or begin the text (-1). head: length of a cached head before all of them. multiple: of which Q is one,
    since GPU kernels copy a mask that is not aligned to 16.
    -> ({"input_ids" [B, Q], "position_ids" [B, Q], "attention_mask" [B, 1, Q, head + Q] bool}, starts), where
       starts[b][s] is the first column of segment s. Equal to separate rows: no segment sees a sibling.
    """
    width = -max(sum(len(ids) for ids, _ in tree) for tree in trees) // multiple * -multiple
    tokens, depth = np.full((len(trees), width), pad), np.zeros((len(trees), width), dtype=np.int64)
    see = np.zeros((len(trees), 1, width, head + width), dtype=bool)
    see[:, 0, :, :head] = True
    see[:, 0, range(width), range(head, head + width)] = True  # padding sees itself: no row of the softmax is empty
    starts = []
    for b, tree in enumerate(trees):
        at, begins, ends, above = 0, [], [], []
        for ids, parent in tree:
            n, begin = len(ids), ends[parent] if parent >= 0 else 0
            own = slice(at, at + n)
            tokens[b, own], depth[b, own] = ids, range(begin, begin + n)
            ancestors = [*above[parent], parent] if parent >= 0 else []
            for s in ancestors:
                see[b, 0, own, head + begins[s] : head + begins[s] + len(tree[s][0])] = True
            see[b, 0, own, head + at : head + at + n] = np.tri(n, dtype=bool)
            begins.append(at)
            ends.append(begin + n)
            above.append(ancestors)
            at += n
        starts.append(begins)
    inputs = {"input_ids": tokens, "position_ids": depth + head, "attention_mask": see}
    return {k: torch.from_numpy(v) for k, v in inputs.items()}, starts


def path_ids(tree, segment):
    """Token ids of the text that ends with this segment of a token tree: its ancestors' and its own."""
    ids, parent = tree[segment]
    return (path_ids(tree, parent) if parent >= 0 else []) + list(ids)


def additive(see, dtype):
    """A boolean mask as what attention adds to its scores; sdpa would make that of it again in every layer."""
    return torch.zeros(see.shape, dtype=dtype, device=see.device).masked_fill_(~see, torch.finfo(dtype).min)


def radix(rows, limits):
    """Rows of token ids as one tree of segments (see tree_batch) that holds common beginnings once.

    limits: how many tokens of each row may be shared; the rest, at least the token that predicts the first trained
    one, stands alone. -> (segments, paths), paths[i] being the segment numbers of row i.
    """
    segments, paths = [], [[] for _ in rows]

    def grow(group, at, path):
        end = at
        if len(group) == 1:
            end = len(rows[group[0]])
        else:
            most = min(limits[i] for i in group)
            first = rows[group[0]]
            while end < most and all(rows[i][end] == first[end] for i in group):
                end += 1
        if end > at:
            segments.append((rows[group[0]][at:end], path[-1] if path else -1))
            path = [*path, len(segments) - 1]
        if len(group) == 1:
            paths[group[0]] = path
            return
        branches = {}
        for i in group:
            key = rows[i][end] if end < limits[i] else ("alone", i)
            branches.setdefault(key, []).append(i)
        for branch in branches.values():
            grow(branch, end, path)

    grow(list(range(len(rows))), 0, [])
    return segments, paths


def neighbours(rows, group=None):
    """Numbers of the rows (token id lists) in groups of at most `group`, those that begin alike together."""
    order, group = sorted(range(len(rows)), key=rows.__getitem__), group or GROUP
    return [order[i : i + group] for i in range(0, len(order), group)]


def packed_shape(rows, trained, group=None):
    """(trees, width, trained tokens) of a micro-batch of token id lists whose last `trained[i]` ids are trained."""
    trees = [
        radix([rows[i] for i in g], [len(rows[i]) - trained[i] - 1 for i in g])[0] for g in neighbours(rows, group)
    ]
    return len(trees), max(sum(len(ids) for ids, _ in tree) for tree in trees), sum(trained)


def pack_prompts(prompts, trie, pad, group=None):
    """Prompts that end in the same labels, packed for a training step: prefixes shared, the label trie after each.

    prompts: N token id lists -> model inputs with logits_to_keep [B, Q] (bool), and label_logits_at [N, 1 + M]: which
    of the kept logits belong to prompt end and nodes of each prompt (LabelTrie.scores).
    """
    groups = neighbours(prompts, group)
    packed = []
    for g in groups:
        segments, paths = radix([prompts[i] for i in g], [len(prompts[i]) - 1 for i in g])
        firsts = []
        for path in paths:
            firsts.append(len(segments))
            segments += trie.after(path[-1], len(segments))
        packed.append((segments, [path[-1] for path in paths], firsts))
    batch, starts = tree_batch([segments for segments, _, _ in packed], pad, multiple=16)
    width = batch["input_ids"].shape[1]
    at = torch.zeros(len(prompts), 1 + len(trie.nodes), dtype=torch.long)
    for b, (g, (segments, lasts, firsts)) in enumerate(zip(groups, packed, strict=True)):
        for i, last, first in zip(g, lasts, firsts, strict=True):
            nodes = [starts[b][first + k] for k in range(len(trie.nodes))]
            at[i] = torch.tensor([starts[b][last] + len(segments[last][0]) - 1, *nodes]) + b * width
    keep = torch.zeros(len(groups) * width, dtype=torch.bool)
    keep[at.flatten()] = True
    batch["logits_to_keep"] = keep.view(len(groups), width)
    return batch | {"label_logits_at": (keep.cumsum(0) - 1)[at]}


def pack_rows(rows, limits, pad, group=None):
    """Token rows as trees of at most `group` rows: (model inputs of tree_batch, where each row's tokens stand).

    limits as radix. The second: N long tensors, the columns of a row's tokens in the flattened batch [B * Q].
    """
    groups = neighbours(rows, group)
    packed = [radix([rows[i] for i in g], [limits[i] for i in g]) for g in groups]
    batch, starts = tree_batch([segments for segments, _ in packed], pad, multiple=16)
    width, columns = batch["input_ids"].shape[1], [None] * len(rows)
    for b, (g, (segments, paths)) in enumerate(zip(groups, packed, strict=True)):
        for i, path in zip(g, paths, strict=True):
            own = [starts[b][s] + k for s in path for k in range(len(segments[s][0]))]
            columns[i] = torch.tensor(own) + b * width
    return batch, columns


def tree_mask_unsupported_reason(model, longest=0):
    """Why `model` cannot take token trees, as part of a sentence, or None when it can: looked up and tried.

    longest: tokens of the longest text, which a sliding window has to hold whole, since a tree's mask has no window.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    other = kinds - {"full_attention", "sliding_attention"}
    if other:
        return f"it has {' and '.join(sorted(other))} layers"
    if longest > attention_window(config):
        return f"its attention looks back {attention_window(config)} tokens and the longest text has {longest}"
    if not hasattr(model, "ignores_mask"):  # trainer and scorer both ask
        model.ignores_mask = ignores_mask(model)
    return model.ignores_mask


def ignores_mask(model):
    """None where a token tree gives what separate texts give, else what the model does with the mask; tried."""
    training = model.training
    model.eval()
    try:
        apart, shared, beside = try_tree(model)
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as e:
        return f"it takes no such mask ({type(e).__name__}: {one_line(e)[:80]})"
    finally:
        model.train(training)
    # sixteen bits differ a little by path; a mask that is not heeded makes the difference of reading another's text
    if (shared - apart).norm() > 0.3 * (beside - apart).norm():
        return "its attention does not heed the mask"
    return None


def attention_window(config):
    """Tokens that every layer's attention looks back; infinite without a sliding window."""
    found = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return found or float("inf")


def try_tree(model, n=12):
    """Logits of a text alone, after a common prefix next to a sibling, and appended to that sibling (wrong)."""
    ids = torch.arange(5, 5 + 3 * n).tolist()
    head, first, second = ids[:n], ids[n : 2 * n], ids[2 * n :]

    def last(inputs):
        with torch.no_grad():
            inputs = {k: v.to(model.device) for k, v in inputs.items()}
            return model(**inputs, use_cache=False).logits[0, -1].float()

    tree, _ = tree_batch([[(head, -1), (first, 0), (second, 0)]], 0)
    tree["attention_mask"] = additive(tree["attention_mask"], model.dtype)
    return last({"input_ids": torch.tensor([head + second])}), last(tree), last({"input_ids": torch.tensor([ids])})
