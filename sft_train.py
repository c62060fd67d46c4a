"""Supervised fine-tuning with QLoRA: rows {"input", "output"} -> an adapter folder.

python sft_train.py --student Qwen/Qwen2.5-3B-Instruct --data data/creditmix_sft.jsonl --save_dir runs/creditmix_sft
python sft_train.py --student smollm2-135m --data data/creditmix_sft.jsonl --save_dir runs/try --max_steps 20  # CPU
"""

import argparse

from distill.files import cli
from distill.tasks.augment import add_noise_argument, noisy_copies, prompts_of
from distill.train.arguments import add_arguments, training_arguments
from distill.train.data import dataset, describe, encode, read_training_rows, split_for
from distill.train.run import run_training
from distill.train.run_folder import start_run
from distill.train.student import load_student, lora
from distill.train.trainer import trainer_class


def main(args):
    rows, task = read_training_rows(args, {"input": str, "output": str}, answer="output")
    train, dev = split_for(args, rows)
    train, passes = noisy_copies(args, train, "input", "output", task)
    record = start_run(args, "sft")
    model, tokenizer = load_student(args, train)
    train, dropped = encode(tokenizer, train, args.max_len, "input", "output")
    dev, dropped_dev = encode(tokenizer, dev, args.max_len, "input", "output")
    told = describe(tokenizer, train, dropped, dropped_dev)

    from trl import SFTConfig, SFTTrainer

    options = training_arguments(args, model, train, dev, task, passes)
    trainer = trainer_class(SFTTrainer, task, dev)(
        model=lora(model, args),
        args=SFTConfig(**options, max_length=None, shuffle_dataset=False),
        train_dataset=dataset(train, "input_ids", "labels"),
        eval_dataset=dataset(dev, "input_ids", "labels"),
        processing_class=tokenizer,
    )
    run_training(trainer, args, task, dev, {**record, **told}, prompts_of(train))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "data/creditmix_sft.jsonl", "runs/creditmix_sft", 2e-4)
    add_noise_argument(parser)
    cli(main, parser)
