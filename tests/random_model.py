"""A folder with a model of random weights in the shape of Qwen2.5, for measurements of speed and memory without a hub.

    python tests/random_model.py 3b runs/random-3b

It has the tokenizer of the embedded student and the vocabulary's size of Qwen's. On a GPU it takes seconds.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from distill.files import cli
from distill.hardware import device
from distill.model.hub import embedded_student

SHAPES = {  # hidden size, inner size, layers, heads, key-value heads; of the models' config.json
    "0.5b": (896, 4864, 24, 14, 2),
    "1.5b": (1536, 8960, 28, 12, 2),
    "3b": (2048, 11008, 36, 16, 2),
}


def with_adapters(model, number):
    """The model with `number` LoRA adapters of random weights, the first one active."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    for i in range(1, number):
        model.add_adapter(f"other{i}", config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.01)
    return model.eval()


def main(args):
    hidden, inner, layers, heads, pairs = SHAPES[args.shape]
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device(device()):
        model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(args.folder)
    AutoTokenizer.from_pretrained(embedded_student()).save_pretrained(args.folder)
    print(f"{args.folder}: {sum(p.numel() for p in model.parameters()) / 1e9:.2f}e9 random weights")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("shape", choices=SHAPES)
    p.add_argument("folder", type=Path)
    cli(main, p)
