"""Fused LoRA layers give what PEFT's give: outputs, gradients, with checkpointing, in 4 bits, with dropout."""

import pytest
import torch

from distill.model import fused_lora as fused
from distill.model.fused_lora import fuse


def student(tiny, dropout=0.0, quantised=False):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {"dtype": torch.float32}
    if quantised:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    model = AutoModelForCausalLM.from_pretrained(tiny, **options)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets))
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.1)
    return model.train()


def step(model):
    torch.manual_seed(2)
    ids = torch.randint(0, 1000, (3, 11))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_layers_have_the_loss_and_gradients_of_peft(tiny, monkeypatch, quantised, checkpointing):
    monkeypatch.setattr(fused, "CHUNK", 8)  # 33 tokens: whole chunks and a rest
    model = student(tiny, quantised=quantised)
    loss, gradients = step(model)
    assert fuse(model) == (14, 2, 5)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    same, found = step(model)
    assert abs(loss - same) < 1e-5 and gradients.keys() == found.keys() and len(found) == 28
    assert max((gradients[n] - found[n]).abs().max() for n in found) < 1e-5


def test_fused_mlp_is_not_computed_again_by_a_checkpoint(tiny, monkeypatch):
    model, calls = student(tiny), []
    fuse(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    forward = fused.GatedMlp.forward
    monkeypatch.setattr(fused.GatedMlp, "forward", lambda *a: calls.append(1) or forward(*a))
    step(model)
    assert len(calls) == 2  # one a layer


def test_fused_dropout_is_drawn_again_alike_and_is_off_in_evaluation(tiny):
    model = student(tiny, dropout=0.5)
    fuse(model)
    loss, gradients = step(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    same, found = step(model)
    assert loss == same and max((gradients[n] - found[n]).abs().max() for n in found) < 1e-6
    model.eval()
    whole, _ = step(model)
    undropped, _ = step(student(tiny).eval())
    assert abs(whole - undropped) < 1e-5 and abs(whole - loss) > 1e-4


def test_a_norm_that_is_another_keeps_its_own():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    gemma = GemmaRMSNorm(8)
    gemma.variance_epsilon = gemma.eps
    assert not fused.is_rms_norm(gemma) and fused.is_rms_norm(LlamaRMSNorm(8))


def test_fused_layers_step_aside_for_the_reference(tiny):
    model = student(tiny)
    ids = torch.arange(8)[None]
    with torch.no_grad(), model.disable_adapter():
        expected = model(ids).logits
    fuse(model)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, expected)


def test_fused_layers_heed_the_adapter_of_each_row(tiny):
    model = student(tiny).eval()
    model.add_adapter("other", model.peft_config["default"])
    torch.manual_seed(3)
    for name, p in model.named_parameters():
        if ".other." in name:
            p.data.normal_(0, 0.3)
    ids, names = torch.arange(36).view(3, 12), ["default", "other", "__base__"]
    with torch.no_grad():
        expected = model(ids, adapter_names=names).logits
        fuse(model)
        found, alone = model(ids, adapter_names=names).logits, model(ids).logits
    assert torch.equal(found, expected) and (found - alone).abs().amax((1, 2))[1:].min() > 0.01


def test_offloaded_layers_are_left_to_accelerate(tiny):
    from accelerate import cpu_offload

    model = student(tiny)
    expected, _ = step(model)
    for layer in model.get_base_model().model.layers:
        for part in (layer.mlp.gate_proj.base_layer, layer.self_attn.q_proj.base_layer, layer.input_layernorm):
            cpu_offload(part, "cpu")
    assert fuse(model) == (10, 0, 3)
    assert abs(step(model)[0] - expected) < 1e-5


def test_a_weight_rewritten_for_a_cpu_kernel_is_not_taken_for_plain_4_bits(tiny):
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model = student(tiny, quantised=True)
    base = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    base.weight.data, _ = _convert_weight_packed_for_cpu(base.weight.data, base.weight.quant_state)
    assert fuse(model) == (13, 2, 5)
