"""Text generation: equal to transformers' generate, settings of its own, memory, samples, callbacks."""

import functools
import json
import random
import shutil

import pytest
import torch
from conftest import ROOT
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
)

from common import load_model, prompt_ids
from distill.files import UserError
from distill.model import continuous_batching
from distill.model.continuous_batching import Plan, plan_batches
from distill.model.decode_graph import DecodeStep, stepped
from distill.model.generate import end_tokens, generate
from distill.model.hub import EMBEDDED
from distill.model.sampling import Request, random_numbers, ranked_tokens, sample
from distill.model.slot_cache import SlotCache, key_shape
from distill.model.transformers_generate import generate_in_batches
from distill.tasks.codegen_samples import Sampling
from distill.tasks.codegen_samples import sample as sample_code
from distill.tasks.idp_decode import Constraint, DocumentDecoder, Vocabulary
from distill.tasks.idp_documents import extract
from distill.tasks.idp_schema import check_schema

MESSAGES = ["Write a sorting function.", "Hello", "Count to ten, " * 12, "List three colours."]
SCHEMA = json.loads((ROOT / "data" / "sroie_schema.json").read_text())


@pytest.fixture(scope="module")
def loaded(tiny):
    return load_model(tiny, "fp32")


@pytest.fixture(scope="module")
def built():
    """built("qwen2") -> a tiny random model of that architecture."""
    common = {"vocab_size": 49152, "hidden_size": 64, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
    common |= {"pad_token_id": 2, "tie_word_embeddings": True}
    attention = common | {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    attention |= {"max_position_embeddings": 1024}
    configs = {
        "llama": lambda: LlamaConfig(**attention),
        "qwen2": lambda: Qwen2Config(**attention),
        "phi3": lambda: Phi3Config(**attention),
        "gemma3": lambda: Gemma3TextConfig(**attention, head_dim=16, sliding_window=32),
        "mistral": lambda: MistralConfig(**attention, sliding_window=64),
        "mamba": lambda: MambaConfig(**common),
    }

    @functools.cache
    def make(name):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(configs[name]()).eval()

    return make


@pytest.fixture
def with_generation_config(tiny, tmp_path):
    """with_generation_config({...}) -> a copy of `tiny` whose generation_config.json has these settings."""

    def make(settings):
        folder = tmp_path / "model"
        shutil.copytree(tiny, folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **settings}))
        return load_model(folder, "fp32")

    return make


def random_prompts(n, shared=20, longest=60):
    """Prompts of random tokens that begin with the same `shared` ones."""
    rng = random.Random(0)
    return [[7] * shared + [rng.randrange(5, 40_000) for _ in range(rng.randrange(2, longest))] for _ in range(n)]


def by_transformers(model, ids, max_new_tokens):
    """What transformers' generate writes greedily for one prompt."""
    out = model.generate(
        torch.tensor([ids], device=model.device),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=2,
    )
    found = out[0, len(ids) :].tolist()
    return found[: found.index(2)] if 2 in found else found


def tokens_of(replies):
    return [reply.tokens for (reply,) in replies]


# Equal to transformers' generate


@pytest.mark.parametrize("burst", [1, 8])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_greedy_equals_transformers_generate_token_by_token(loaded, built, monkeypatch, name, burst):
    """50 prompts through 7 slots; bursts, as on a GPU, write past the end of a sequence."""
    monkeypatch.setattr(continuous_batching, "DecodeStep", functools.partial(DecodeStep, burst=burst))
    model, prompts = built(name), random_prompts(50)
    model.slot_decoder = None
    limits = [1 + i % 24 for i in range(50)]
    found = tokens_of(generate(model, loaded[1], prompts, limits, batch_size=7))
    assert model.slot_shape is not None
    assert found == [by_transformers(model, ids, limit) for ids, limit in zip(prompts, limits, strict=True)]


def test_greedy_equals_transformers_generate_on_the_embedded_student():
    model, tokenizer = load_model(EMBEDDED, "fp32")
    ids = prompt_ids(tokenizer, MESSAGES)
    found = tokens_of(generate(model, tokenizer, ids, 24, batch_size=3))
    assert found == [by_transformers(model, i, 24) for i in ids]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma3", "its cache has layers of another kind (DynamicSlidingWindowLayer)"),
        ("mistral", "its cache has layers of another kind (DynamicSlidingWindowLayer)"),
        ("mamba", "it keeps a state instead of keys and values"),
    ],
)
def test_other_architectures_go_through_transformers_generate_and_say_why_once(loaded, built, capsys, name, reason):
    model, prompts = built(name), random_prompts(7)
    found = tokens_of(generate(model, loaded[1], prompts, 9, batch_size=3))
    assert found == [by_transformers(model, ids, 9) for ids in prompts]
    assert tokens_of(generate(model, loaded[1], prompts[:1], 9)) == found[:1]
    assert capsys.readouterr().err == f"generating by transformers' generate, which is slower: {reason}\n"


def test_adapters_on_off_and_changed(loaded, tiny_adapter, tiny):
    tokenizer, prompts = loaded[1], random_prompts(4)
    model, _ = load_model(tiny_adapter("one"), "fp32")
    model.load_adapter(tiny_adapter("two"), adapter_name="two")
    found = {}
    for name in ("default", "two", "default"):
        model.set_adapter(name)
        found[name] = tokens_of(generate(model, tokenizer, prompts, 12))
        assert found[name] == [by_transformers(model, ids, 12) for ids in prompts]
    with model.disable_adapter():
        found["base"] = tokens_of(generate(model, tokenizer, prompts, 12))
    assert found["base"] == tokens_of(generate(load_model(tiny, "fp32")[0], tokenizer, prompts, 12))
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if "lora_B.default" in n):
            parameter.mul_(-1)
    changed = tokens_of(generate(model, tokenizer, prompts, 12))
    assert changed == [by_transformers(model, ids, 12) for ids in prompts]
    assert len({str(tokens) for tokens in (*found.values(), changed)}) == 4


def test_a_grammar_writes_the_same_on_both_ways(loaded):
    model, tokenizer = loaded
    constraint = Constraint.of(check_schema(SCHEMA), Vocabulary.of(tokenizer, model.config.vocab_size), 50)
    ids = prompt_ids(tokenizer, MESSAGES)

    def decoder(i):
        return DocumentDecoder(constraint, 50)

    for temperature in (0.0, 1.0):
        found = tokens_of(
            generate(model, tokenizer, ids, 50, batch_size=3, processor=decoder, temperature=temperature, seed=[1] * 4)
        )
        numbers = random_numbers([1, 0], 50)
        requests = [Request(i, 0, row, 50, numbers, decoder) for i, row in enumerate(ids)]
        generate_in_batches(model, requests, 2, 2, {2}, temperature, lambda request: None)
        assert found == [request.tokens for request in requests]


# Memory and work


def test_plans_by_hand():
    assert plan_batches([500, 400, 300], 16, 10**6) == [Plan(512, 3, 3)]
    assert plan_batches([505, 10], 1, 10**6) == [Plan(768, 1, 2)]  # the steps of a burst need room, too
    # memory for 4,096 tokens: two long ones at once, then many short ones
    assert plan_batches([2000, 1900, 1000, 200, 100, 90], 16, 4096) == [Plan(2048, 2, 3), Plan(256, 3, 3)]
    assert plan_batches([9000], 16, 4096) == [Plan(9216, 1, 1)]


def test_step_sizes():
    assert [stepped(n, 1, 24, 4) for n in (1, 2, 5, 16, 17, 24)] == [1, 4, 16, 16, 24, 24]
    assert [stepped(n, 256, 1536, 2) for n in (1, 256, 257, 1300)] == [256, 256, 512, 1536]


def test_a_waiting_sequence_takes_the_slot_of_one_that_has_ended(loaded, monkeypatch):
    rows = []
    step = DecodeStep.step
    monkeypatch.setattr(DecodeStep, "step", lambda self, model, n, *rest: rows.append(n) or step(self, model, n, *rest))
    generate(*loaded, random_prompts(5, longest=3), [4, 12, 4, 4, 4], batch_size=2)
    # the first token of each comes with its prompt; without replacement 11 + 3 + 3 steps
    assert rows == [2] * 11 + [1]


def test_the_common_beginning_is_computed_once(loaded, monkeypatch):
    model, tokenizer = loaded
    seen = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    prompts = [[7] * 200 + [i, i + 1] for i in range(10, 16)]
    found = generate(model, tokenizer, prompts, 3, batch_size=6)
    hook.remove()
    assert seen == [(1, 200), (6, 2), (6, 1), (6, 1)]
    assert tokens_of(found) == [by_transformers(model, ids, 3) for ids in prompts]


def test_a_decoded_token_copies_no_cache(loaded):
    model, tokenizer = loaded
    generate(model, tokenizer, random_prompts(2), 5)
    cache = model.slot_decoder.cache
    with torch.inference_mode():
        keys, values = cache.decode(torch.tensor([30, 40]), 64).update(*torch.ones(2, 2, 2, 1, 16), 0)
    assert keys.data_ptr() == cache.store[0, 0].data_ptr() and values.data_ptr() == cache.store[0, 1].data_ptr()
    assert keys.shape == (2, 2, 64, 16) and keys[1, :, 40].eq(1).all() and keys[0, :, 30].eq(1).all()


def test_a_batch_that_does_not_fit_is_halved(loaded, monkeypatch, capsys):
    """Sequences that are complete stay, the others begin again, and no token is reported twice."""
    model, tokenizer = loaded
    prompts = random_prompts(9)
    expected = generate(model, tokenizer, prompts, 12, batch_size=9)
    model.slot_decoder, calls, seen = None, [], {}
    step = DecodeStep.step

    def limited(self, model, rows, *rest):
        calls.append(rows)
        if rows > 3 and len(calls) % 4 == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, model, rows, *rest)

    monkeypatch.setattr(DecodeStep, "step", limited)
    found = generate(
        model,
        tokenizer,
        prompts,
        12,
        batch_size=9,
        on_token=lambda i, k, token: seen.setdefault(i, []).append(token),
    )
    assert found == expected
    assert [seen[i] for i in range(9)] == tokens_of(expected)
    assert "out of memory with 9 sequences at once: continuing with 4\n" in capsys.readouterr().err
    monkeypatch.setattr(DecodeStep, "step", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, tokenizer, prompts, 12)


def test_memory_is_kept_for_the_next_call_that_fits_in_it(loaded, monkeypatch):
    model, tokenizer = loaded
    made = []
    init = SlotCache.__init__
    monkeypatch.setattr(SlotCache, "__init__", lambda self, *args: made.append(args[1:]) or init(self, *args))
    model.slot_decoder = None
    for n, limit in ((6, 20), (4, 12), (6, 20), (6, 300)):
        generate(model, tokenizer, random_prompts(n), limit)
    assert made == [(6, 256), (6, 512)]


@torch.inference_mode()
def test_a_step_of_more_rows_than_are_running_stays_within_the_cache(loaded):
    """A graph has more rows than are running; those write too, for as many steps as run without a look."""
    model, _ = loaded
    cache = SlotCache(key_shape(model), slots=4, capacity=32)
    step = DecodeStep(cache, limit=16, burst=8)
    step.load([5], [3], [1])
    step.tokens(model, cache.slots, last=10, steps=8, sampled=True)
    assert step.state[1].tolist() == [11, 32, 32, 32]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_give_what_transformers_generate_gives(tiny, capsys):
    model, tokenizer = load_model(tiny, "fp32")
    prompts = random_prompts(50)
    limits = [1 + i % 24 for i in range(50)]
    found = tokens_of(generate(model, tokenizer, prompts, limits, batch_size=7))
    assert found == [by_transformers(model, ids, limit) for ids, limit in zip(prompts, limits, strict=True)]
    assert model.slot_decoder.step.graphs and "without CUDA graphs" not in capsys.readouterr().err
    together = generate(model, tokenizer, prompts, 16, batch_size=50, temperature=1.0, seed=7)
    few = generate(model, tokenizer, prompts, 16, batch_size=3, temperature=1.0, seed=7)
    # a GPU sums in another order for another batch, which moves a sample where its random number meets a token's edge
    assert sum(a == b for a, b in zip(together, few, strict=True)) >= 45
    constraint = Constraint.of(check_schema(SCHEMA), Vocabulary.of(tokenizer, model.config.vocab_size), 50)
    values = [
        e.value for e in extract(model, tokenizer, ["ACME LTD TOTAL 5.00"] * 9, SCHEMA, constraint, 50, batch_size=5)
    ]
    assert all(value == values[0] and set(value) == set(SCHEMA["properties"]) for value in values)


# Settings, samples, callbacks


def test_checkpoint_settings_do_not_change_idp_or_codegen(loaded, with_generation_config):
    """Qwen2.5 ships repetition_penalty 1.05 and top_k 20: the settings are ours, except for the end tokens."""
    settings = {"repetition_penalty": 1.3, "top_k": 1, "top_p": 0.1, "do_sample": True, "no_repeat_ngram_size": 2}
    other = with_generation_config(settings)
    found = []
    for model, tokenizer in (loaded, other):
        constraint = Constraint.of(check_schema(SCHEMA), Vocabulary.of(tokenizer, model.config.vocab_size), 60)
        values = [e.value for e in extract(model, tokenizer, ["ACME LTD TOTAL 5.00 5.00 5.00"], SCHEMA, constraint, 60)]
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
