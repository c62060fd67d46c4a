"""Token trees: masks and positions by hand, and shared_prefix training equal to the plain batch."""

import random
from functools import partial

import pytest
import torch

from distill.model.label_trie import LabelTrie
from distill.model.token_tree import pack_prompts, radix, tree_batch
from distill.train.trl_prefix import share_prefixes


def test_tree_batch_by_hand():
    #  10 11 -+- 12        columns 0 1 | 2 | 3 4 | pad
    #         +- 13 14
    batch, starts = tree_batch([[([10, 11], -1), ([12], 0), ([13, 14], 0)], [([7], -1)]], pad=0)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 14], [7, 0, 0, 0, 0]]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 2, 3] and starts == [[0, 2, 3], [0]]
    assert batch["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert batch["attention_mask"][1, 0].diagonal().all()  # padding sees itself: no row of the softmax is empty


def test_tree_batch_after_a_cached_head():
    batch, _ = tree_batch([[([5], -1), ([6], 0)]], pad=0, head=3)
    assert batch["position_ids"].tolist() == [[3, 4]]
    assert batch["attention_mask"][0, 0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_radix_holds_common_beginnings_once_and_restores_every_row():
    rows = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 9, 9], [1, 2, 3, 4]]
    segments, paths = radix(rows, [3, 3, 3, 3])
    assert [[token for s in path for token in segments[s][0]] for path in paths] == rows
    assert sum(len(ids) for ids, _ in segments) == 2 + 1 + 2 + 3  # 1 2 | 3 | 9 9 | 4, 5, 4: the last token is its own
    assert all(parent < i for i, (_, parent) in enumerate(segments))


def rows_with_a_head(seed, pairs):
    """Ragged (ids, labels) after one head; with pairs, two different answers after each prompt."""
    rng = random.Random(seed)
    head, out = [rng.randrange(100) for _ in range(17)], []
    for _ in range(7):
        prompt = head + [rng.randrange(4) for _ in range(rng.randint(1, 30))]
        for _ in range(2 if pairs else 1):
            answer = [rng.randrange(100) for _ in range(rng.randint(1, 5))]
            out.append((prompt + answer, [-100] * len(prompt) + answer))
    return out


def padded(rows):
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [2] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
    }


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("group", [3, 20])
def test_shared_prefix_has_the_loss_and_gradients_of_the_plain_batch(tiny, pairs, group):
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1", "mean_logits"))
    batch = padded(rows_with_a_head(group, pairs))

    def step():
        model.zero_grad()
        out = model(**batch, fused_lm_head=True, use_cache=False)
        weight = torch.linspace(-1, 1, out.log_probs.numel()).view(out.log_probs.shape)
        (out.log_probs * weight).sum().backward()
        return out, {n: p.grad.clone() for n, p in model.named_parameters()}

    plain, gradients = step()
    share_prefixes(model, pad=2, group=group)
    shared, found = step()
    for name in ("log_probs", "entropy", "mean_logits"):
        assert (plain[name] - shared[name]).abs().max() < 1e-4
    assert (plain.is_top1 == shared.is_top1).all() and (plain.label_mask == shared.label_mask).all()
    assert max((gradients[n] - found[n]).abs().max() for n in gradients) < 1e-4


def test_shared_prefix_computes_fewer_tokens():
    rows = [ids for ids, _ in rows_with_a_head(0, pairs=True)]
    segments, _ = radix(rows, [len(r) - 1 for r in rows])
    assert sum(len(ids) for ids, _ in segments) < 0.5 * sum(map(len, rows))


def test_shared_prefix_of_label_prompts_gives_the_scores_of_each_alone(tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    trie = LabelTrie([[5], [6, 7], [6, 8, 9]])
    prompts = [ids for ids, _ in rows_with_a_head(3, pairs=False)]

    def scores(group):
        batch = pack_prompts(prompts, trie, pad=2, group=group)
        at = batch.pop("label_logits_at")
        return trie.scores(model(**batch, use_cache=False).logits[at])

    alone, shared = scores(1), scores(20)
    assert (alone - shared).abs().max() < 1e-4
    for label, ids in enumerate([[5], [6, 7], [6, 8, 9]]):
        logp = model(torch.tensor([prompts[0] + ids])).logits[0].log_softmax(-1)
        by_hand = sum(logp[len(prompts[0]) - 1 + k, t] for k, t in enumerate(ids)) / len(ids)
        assert abs(by_hand - alone[0, label]) < 1e-4


def test_kd_computes_label_scores_in_parts_with_loss_and_gradients_of_the_whole(tiny):
    """More prompts than a part holds, a tree mask that is additive: against scores of one piece and a boolean mask."""
    from types import SimpleNamespace

    from transformers import AutoModelForCausalLM

    from distill.train.label_distribution import LabelTrainer
    from kd_train import distribution_loss

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    trie, rng = LabelTrie([[5], [6, 7], [6, 8, 9]]), random.Random(0)
    rows = [
        {"prompt_ids": [*range(20, 40), *rng.choices(range(50, 90), k=n)], "teacher": [0.5, 0.3, 0.2], "gold": n % 3}
        for n in range(3, 80)
    ]
    trainer = object.__new__(LabelTrainer)  # no data to construct it with
    trainer.trie, trainer.loss = trie, partial(distribution_loss, temperature=2.0, alpha=0.3)
    trainer.model, trainer.processing_class = model, SimpleNamespace(pad_token_id=2)
    in_parts = trainer.compute_loss(model, trainer.collate(rows))
    in_parts.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    batch = trainer.collate(rows)
    teacher, gold, at = (batch.pop(k) for k in ("teacher", "gold", "label_logits_at"))
    whole = distribution_loss(trie.scores(model(**batch, use_cache=False).logits[at]), teacher, gold, 2.0, 0.3)
    whole.backward()
    assert abs(in_parts - whole) < 1e-5
    for name, p in model.named_parameters():
        assert (found[name] - p.grad).norm() < 1e-4 * p.grad.norm().clamp(min=1e-3), name
