"""The student and its LoRA adapter."""

from common import load_base

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_student(student: str, precision: str = "auto", base: tuple | None = None):
    """(model, tokenizer) of the base model to train an adapter on. base: base_config(student), if known."""
    model, tokenizer = load_base(student, precision, base)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # evaluation would repack the 4-bit weights for a CPU kernel that gives the layers below no gradient
            module.support_avx512bf16_for_cpu = False
    return model, tokenizer


def lora_config(model, student: str, r: int):
    """LoRA of rank r, alpha 2 r, on all linear layers (QLoRA, arXiv 2305.14314), whatever the model calls them.

    student: the name of the base model that the adapter's config records.
    """
    from peft import LoraConfig

    names, targets = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}, TARGETS
    if not set(TARGETS) <= names:
        targets = "all-linear"
        print(f"adapter on all linear layers: no {', '.join(sorted(set(TARGETS) - names))} in this model")
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM")
    if "mamba" in model.config.model_type:  # its kernels read these weights and bypass the adapter
        config.exclude_modules = ["out_proj", "dt_proj"]
    config.base_model_name_or_path = student
    return config


def with_lora(model, student: str, r: int, seed: int):
    """The model with a fresh adapter, whose weights depend on the seed alone."""
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(seed)
    return get_peft_model(model, lora_config(model, student, r))
