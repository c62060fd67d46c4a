"""The student and its LoRA adapter."""

from common import add_adapter, load_base
from distill.files import UserError
from distill.hardware import cap_memory, choose_precision
from distill.model.hub import base_config
from distill.train.arguments import micro_batch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_student(args, rows, base=None):
    """(model, tokenizer) of args.student under --max_vram_gb; what a step is expected to take is told before loading.

    base: base_config(args.student), where it is known. Error: UserError where the weights alone are more than the cap.
    """
    from distill.train.memory import expected_memory, expected_step, longest_texts, smaller

    cap = cap_memory(args.max_vram_gb)
    if args.max_vram_gb and not cap:
        print("--max_vram_gb: no GPU here, so there is nothing to cap")
    _, config, tokenizer = base = base or base_config(args.student)
    precision, _ = choose_precision(config, args.precision)
    micro, _ = micro_batch(args)
    try:
        gib, shape = expected_step(args, config, precision, longest_texts(tokenizer, rows, micro, args.max_len))
        weights = expected_memory(config, precision, (0, 0, 0), args.lora_r, True)
    except AttributeError:
        print("expected memory: not known for an architecture without attention and MLP of the usual names")
    else:
        print(f"expected memory: about {gib:.1f} GiB ({micro} rows at once, as {shape[0]} trees of {shape[1]} tokens)")
        if cap and weights > cap:
            raise UserError(
                f"{args.student}: {weights:.1f} GiB of weights in {precision} under {cap:.1f} GiB; {smaller(precision)}"
            )
    model, tokenizer = load_base(args.student, args.precision, base)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # evaluation would rewrite 4-bit weights for a CPU kernel that gives the layers below no gradient
            module.support_avx512bf16_for_cpu = False
    return model, tokenizer


def lora_config(args, model):
    """An adapter on all linear layers of the student (QLoRA, arXiv 2305.14314), whatever it calls them."""
    from peft import LoraConfig

    names, targets = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}, TARGETS
    if not set(TARGETS) <= names:
        targets = "all-linear"
        print(f"adapter on all linear layers: no {', '.join(sorted(set(TARGETS) - names))} in this model")
    config = LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, lora_dropout=0.05, target_modules=targets)
    if "mamba" in model.config.model_type:  # its kernels read these weights past the adapter
        config.exclude_modules = ["out_proj", "dt_proj"]
    config.task_type, config.base_model_name_or_path = "CAUSAL_LM", args.student
    return config


def lora(model, args, init_adapter=None):
    """The student with a fresh adapter, or with a trained one to go on from."""
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(args.seed)  # TRL would do so only after the adapter is drawn
    if init_adapter:
        return add_adapter(model, init_adapter, trainable=True)
    return get_peft_model(model, lora_config(args, model))
