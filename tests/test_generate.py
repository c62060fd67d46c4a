"""Text generation (distill/model/generate.py): decoding settings, ends, sampling, callbacks."""

import json
import shutil

import pytest
import torch
from conftest import ROOT

from common import load_model, prompt_ids
from distill.files import UserError
from distill.model.generate import end_tokens, generate
from distill.model.sampling import ranked_tokens, sample
from distill.tasks.codegen_samples import Sampling
from distill.tasks.codegen_samples import sample as sample_code
from distill.tasks.idp_decode import Constraint, Vocabulary
from distill.tasks.idp_documents import extract
from distill.tasks.idp_schema import check_schema

MESSAGES = ["Write a sorting function.", "Hello", "Count to ten, " * 12, "List three colours."]


@pytest.fixture(scope="module")
def loaded(tiny):
    return load_model(tiny)


@pytest.fixture
def with_generation_config(tiny, tmp_path):
    """with_generation_config({...}) -> a copy of `tiny` whose generation_config.json has these settings."""

    def make(settings):
        folder = tmp_path / "model"
        shutil.copytree(tiny, folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **settings}))
        return load_model(folder)

    return make


def by_transformers(model, ids, max_new_tokens):
    """What transformers' generate writes greedily for one prompt."""
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=2, pad_token_id=2
    )
    found = out[0, len(ids) :].tolist()
    return found[: found.index(2)] if 2 in found else found


def test_greedy_equals_transformers_generate_token_by_token(loaded):
    model, tokenizer = loaded
    ids = prompt_ids(tokenizer, MESSAGES)
    replies = generate(model, tokenizer, ids, 24, batch_size=3)
    assert [reply.tokens for (reply,) in replies] == [by_transformers(model, i, 24) for i in ids]


def test_checkpoint_settings_do_not_change_idp_or_codegen(loaded, with_generation_config):
    """Qwen2.5 ships repetition_penalty 1.05 and top_k 20: the settings are ours, except for the end tokens."""
    settings = {"repetition_penalty": 1.3, "top_k": 1, "top_p": 0.1, "do_sample": True, "no_repeat_ngram_size": 2}
    other = with_generation_config(settings)
    schema = json.loads((ROOT / "data" / "sroie_schema.json").read_text())
    found = []
    for model, tokenizer in (loaded, other):
        constraint = Constraint.of(check_schema(schema), Vocabulary.of(tokenizer, model.config.vocab_size), 60)
        values = extract(model, tokenizer, ["ACME LTD TOTAL 5.00 5.00 5.00"], schema, constraint, 60)
        replies = []
        for sampling in (Sampling(max_new_tokens=40), Sampling(max_new_tokens=40, n=2, temperature=1.5)):
            rows = sample_code(model, tokenizer, ["Write one()."] * 2, [0, 1], sampling)
            replies += [row["reply"] for row in rows]
        found.append((values, replies))
    assert found[0] == found[1]


def test_every_end_token_of_the_checkpoint_ends_a_reply(loaded, with_generation_config):
    model, tokenizer = loaded
    ids = prompt_ids(tokenizer, MESSAGES[:1])
    whole = generate(model, tokenizer, ids, 24)[0][0]
    second = whole.tokens[5]
    model, tokenizer = with_generation_config({"eos_token_id": [2, second]})
    assert end_tokens(model, tokenizer) == {2, second}
    reply = generate(model, tokenizer, ids, 24)[0][0]
    assert reply.ended and not whole.ended
    assert reply.tokens == whole.tokens[: whole.tokens.index(second)]


def test_a_sample_does_not_depend_on_its_batch(loaded):
    model, tokenizer = loaded
    ids = prompt_ids(tokenizer, MESSAGES)
    together = generate(model, tokenizer, ids, 16, batch_size=8, temperature=1.0, n=2, seed=7)
    apart = generate(model, tokenizer, ids, 16, batch_size=1, temperature=1.0, n=2, seed=7)
    assert together == apart
    assert together[0][0].tokens != together[0][1].tokens
    assert together != generate(model, tokenizer, ids, 16, batch_size=8, temperature=1.0, n=2, seed=8)
    # one seed per prompt: a part of the prompts gives a part of the replies
    seeded = generate(model, tokenizer, ids, 16, temperature=1.0, seed=[5, 6, 7, 8])
    assert seeded[2:] == generate(model, tokenizer, ids[2:], 16, temperature=1.0, seed=[7, 8])


def test_limits_and_callbacks(loaded):
    model, tokenizer = loaded
    ids = prompt_ids(tokenizer, MESSAGES[:3])
    tokens, replies = {}, {}
    found = generate(
        model,
        tokenizer,
        ids,
        [3, 9, 5],
        batch_size=2,
        on_token=lambda i, k, token: tokens.setdefault((i, k), []).append(token),
        on_reply=lambda i, k, reply: replies.update({(i, k): reply}),
    )
    assert [len(reply.tokens) for (reply,) in found] == [3, 9, 5]
    assert {key: reply.tokens for key, reply in replies.items()} == tokens
    assert found == [[replies[i, 0]] for i in range(3)]
    assert found[1][0].text == tokenizer.decode(found[1][0].tokens, skip_special_tokens=True)


def test_a_prompt_over_the_context_is_an_error(loaded):
    model, tokenizer = loaded
    with pytest.raises(UserError, match="prompt of 1000 tokens: expected at most 924, the context less 100 new ones"):
        generate(model, tokenizer, [[5] * 1000], 100)


def test_samples_have_the_distribution_of_the_softmax():
    logits = torch.tensor([[1.0, 0.0, -torch.inf, 2.0]])
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    tokens = sample(logits.expand(10_000, -1), 0.7, uniform)
    shares = tokens.bincount(minlength=4) / 10_000
    assert torch.allclose(shares, (logits[0] / 0.7).softmax(0), atol=2e-4)
    assert sample(logits[:, :3], 1.0, torch.tensor([1 - 2**-20])).item() == 1  # never a forbidden token


def test_a_processor_is_offered_allowed_tokens_alone():
    logits = torch.tensor([[1.0, 3.0, -torch.inf, 2.0, -torch.inf], [-torch.inf] * 5])
    assert ranked_tokens(logits, 0.0, None) == [[1, 3, 0], []]
    assert ranked_tokens(logits[:1], 1.0, torch.tensor([0.0])) == [[0, 1, 3, 0]]
