"""Models built otherwise: fused projections, sliding windows, state spaces. They train, and say what without."""

import json

import pytest
import torch
from safetensors.torch import load_file

from common import LabelScorer, load_base
from distill.model import token_tree as trees
from distill.model.hub import embedded_student
from distill.model.token_tree import ignores_mask, tree_mask_unsupported_reason


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(name) -> folder of a tiny random model of another architecture with the embedded student's tokenizer."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        Gemma3TextConfig,
        MambaConfig,
        MistralConfig,
        Phi3Config,
    )

    tokenizer, made = AutoTokenizer.from_pretrained(embedded_student()), {}
    common = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 2, "bos_token_id": 1}
    common |= {"eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    attention |= {"intermediate_size": 128}
    configs = {
        "phi3": lambda: Phi3Config(**common, **attention),
        "gemma3": lambda: Gemma3TextConfig(**common, **attention, head_dim=16, sliding_window=32),
        "mistral": lambda: MistralConfig(**common, **attention, sliding_window=512),
        "mamba": lambda: MambaConfig(**common),
    }

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(configs[name]()).save_pretrained(made[name])
            tokenizer.save_pretrained(made[name])
        return made[name]

    return make


@pytest.mark.parametrize(
    ("name", "longest", "reason"),
    [
        ("phi3", 100, None),
        ("mistral", 100, None),
        ("mistral", 600, "its attention looks back 512 tokens and the longest text has 600"),
        ("gemma3", 20, None),
        ("gemma3", 100, "its attention looks back 32 tokens and the longest text has 100"),
        ("mamba", 100, "it has linear_attention layers"),
    ],
)
def test_trees_are_tried_before_they_are_used(folders, name, longest, reason):
    model, _ = load_base(folders(name), "fp32")
    why = tree_mask_unsupported_reason(model, longest)
    assert why is None if reason is None else reason in why


def test_trainer_and_scorer_try_a_model_once(folders, task, monkeypatch):
    tried = []
    monkeypatch.setattr(trees, "try_tree", lambda model, own=trees.try_tree: tried.append(model) or own(model))
    model, tokenizer = load_base(folders("phi3"), "fp32")
    assert (
        tree_mask_unsupported_reason(model, 100) is None
        and LabelScorer(model, tokenizer, task.labels).forward.trees
        and tried == [model]
    )


def test_eager_attention_takes_trees_and_one_that_drops_the_mask_is_found_out(folders, task):
    model, tokenizer = load_base(folders("phi3"), "fp32")
    model.set_attn_implementation("eager")
    scorer = LabelScorer(model, tokenizer, ("Good", "Good enough", "Bad"))
    assert scorer.forward.trees
    ids = tokenizer([task.prompt(f"Age: {age}") for age in (20, 3)])["input_ids"]
    with torch.no_grad():
        separate = scorer.forward.trie.scores(scorer.forward.separate_logits(ids))
        assert (scorer.forward.scores(ids) - separate).abs().max() < 1e-3
    forward = model.forward
    model.forward = lambda *args, attention_mask=None, **kwargs: forward(*args, **kwargs)
    assert ignores_mask(model) == "its attention does not heed the mask"


@pytest.mark.parametrize("name", ["gemma3", "mamba"])
def test_labels_are_scored_apart_where_a_model_takes_no_trees(folders, task, name):
    model, tokenizer = load_base(folders(name), "fp32")
    labels = ("Good", "Good enough", "Bad")  # one begins another, so the trie has inner nodes
    scorer = LabelScorer(model, tokenizer, labels, task.null_prompts())
    prompts = [task.prompt(f"Age: {age}, Occupation: Writer") for age in (20, 3)]
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    found = scorer.score(prompts)
    assert seen == [1]  # of each text one token's logits, since those of all may not fit the memory
    from common import completion_ids, prompt_ids

    for row, prompt in enumerate(prompts):
        for column, label in enumerate(labels):
            ids, answer = prompt_ids(tokenizer, [prompt])[0], completion_ids(tokenizer, [prompt], [label])[0]
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([ids + answer])).logits[0].log_softmax(-1)
            by_hand = sum(logp[len(ids) - 1 + k, t] for k, t in enumerate(answer)) / len(answer)
            assert abs(found[row, column] - by_hand) < 1e-4


@pytest.mark.parametrize(("name", "shares"), [("phi3", True), ("gemma3", False), ("mamba", False)])
def test_another_architecture_trains_and_says_what_it_does_without(run, folders, jsonl, task, tmp_path, name, shares):
    rows = [{"input": task.prompt(f"Age: {i}.0"), "output": task.labels[i % 3]} for i in range(40)]
    task.save(tmp_path / "creditmix_task.json")
    flags = ["--student", folders(name), "--data", jsonl("creditmix_sft.jsonl", rows), "--save_dir", tmp_path / "a"]
    flags += ["--max_steps", 2, "--batch_size", 4, "--dev_rows", 4, "--precision", "fp32"]
    done = run("sft_train.py", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("rows are computed one by one, without shared prefixes") == (not shares)
    assert ("adapter on all linear layers: no " in done.stdout) == (name != "gemma3")
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert weights and all(w.any() for n, w in weights.items() if "lora_B" in n)
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["status"] == "finished" and record["tokens"]["p99"] > 0
    assert set(record["base"]) == {"revision", "weights", "chat_template"} and record["base"]["weights"]
    answer = run("infer_creditmix.py", "--model_dir", tmp_path / "a", "--features", "Age: 23.0")
    assert json.loads(answer.stdout)["prediction"] in task.labels, answer.stderr[-500:]


def test_a_label_distribution_is_refused_where_a_model_takes_no_trees(run, folders, jsonl, task, tmp_path):
    probs = {"Good": 0.8, "Standard": 0.1, "Bad": 0.1}
    rows = [{"input": task.prompt(f"Age: {i}.0"), "teacher_output": "Good", "teacher_probs": probs} for i in range(40)]
    task.save(tmp_path / "creditmix_task.json")
    flags = ["--student", folders("mamba"), "--data", jsonl("creditmix_kd.jsonl", rows), "--save_dir", tmp_path / "a"]
    done = run("kd_train.py", *flags, "--max_steps", 1, "--batch_size", 4, "--precision", "fp32")
    assert done.returncode == 2 and "a teacher's distribution needs a tree mask, but it" in done.stderr, done.stderr[
        -900:
    ]
