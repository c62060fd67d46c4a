"""Adapters side by side: what each row gets is what PEFT computes for it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from common import LabelScorer, load_base
from distill.model.stacked_lora import StackedAdapters, stackable

ATTENTION, MLP = ["q_proj", "v_proj"], ["gate_proj", "down_proj"]


def with_adapters(tiny, **configs):
    """The tiny model with random adapters of these LoraConfig arguments."""
    torch.manual_seed(0)
    model, tokenizer = load_base(tiny, "fp32")
    for name, arguments in configs.items():
        config = LoraConfig(task_type="CAUSAL_LM", **arguments)
        if hasattr(model, "peft_config"):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    return model.eval(), tokenizer


def test_adapters_of_other_ranks_and_layers(tiny):
    model, _ = with_adapters(
        tiny,
        one={"r": 2, "lora_alpha": 3, "target_modules": ATTENTION},
        two={"r": 5, "lora_alpha": 4, "target_modules": ATTENTION + MLP, "rank_pattern": {"v_proj": 3}},
    )
    ids, names = torch.arange(36).view(3, 12), ["two", "__base__", "one"]
    with torch.inference_mode():
        expected = model(ids, adapter_names=names).logits
        with StackedAdapters(model).rows(names):
            found = model.get_base_model()(ids).logits
        after = model(ids, adapter_names=names).logits
    assert (found - expected).abs().max() < 1e-4 and torch.equal(after, expected)
    apart = [(found[i] - model(ids[i : i + 1], adapter_names=["one"]).logits[0]).abs().max() for i in range(3)]
    assert apart[0] > 0.01 and apart[1] > 0.01 and apart[2] < 1e-4


def test_a_row_is_computed_by_hand():
    from distill.model.stacked_lora import project

    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # two adapters of rank 1 over two inputs
    b = torch.tensor([[10.0, 100.0]])
    others = torch.tensor([[[False, True]], [[True, False]], [[True, True]]])
    x = torch.tensor([[[2.0, 3.0]]]).expand(3, 1, 2)
    out = project(lambda x: x.sum(-1, keepdim=True), a, b, others, x)
    assert out.flatten().tolist() == [5 + 20, 5 + 300, 5]


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_modules": ATTENTION, "use_dora": True},
        {"target_modules": [*ATTENTION, "embed_tokens"]},
        {"target_modules": ATTENTION, "lora_bias": True},
        {"target_modules": ATTENTION, "modules_to_save": ["norm"]},
    ],
)
def test_other_adapters_go_peft_s_way(tiny, arguments):
    model, _ = with_adapters(tiny, one={"r": 2, **arguments})
    assert not stackable(model)


def test_scores_of_adapters_that_do_not_stack(tiny, task):
    model, tokenizer = with_adapters(tiny, one={"r": 2, "target_modules": ATTENTION, "lora_bias": True})
    scorer, prompts = LabelScorer(model, tokenizer, task.labels, task.null_prompts()), task.null_prompts()[:2]
    mixed = scorer.score(prompts, adapters=["one", "__base__"])
    assert abs(mixed[0] - scorer.score(prompts, adapters=["one", "one"])[0]).max() < 1e-5
    assert abs(mixed[0] - scorer.score(prompts)[0]).max() < 1e-5
    assert abs(mixed[1] - scorer.score(prompts)[1]).max() > 1e-3
