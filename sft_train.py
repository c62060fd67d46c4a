"""Supervised fine-tuning with QLoRA: rows {"input", "output"} -> an adapter folder.

python sft_train.py --student Qwen/Qwen2.5-3B-Instruct --data data/creditmix_sft.jsonl --save_dir runs/creditmix_sft
python sft_train.py --student smollm2-135m --data data/creditmix_sft.jsonl --save_dir runs/try --max_steps 20  # CPU
"""

import argparse

from distill.files import cli
from distill.model.hub import base_config
from distill.tasks.augment import swap_label_rows
from distill.train.arguments import (
    add_arguments,
    add_swap_argument,
    best_metric,
    choose_settings,
    passes_over,
    training_arguments,
)
from distill.train.data import (
    SFTRow,
    check_labels,
    dataset,
    describe,
    encode,
    find_task_file,
    read_training_rows,
    split_rows,
)
from distill.train.memory import plan_micro_batch
from distill.train.run import run_training
from distill.train.run_folder import check_run, start_run
from distill.train.student import load_student, with_lora


def main(args):
    # The rows, and the development rows that choose the checkpoint and fit the calibration.
    task_path = find_task_file(args.data, args.task)
    rows, task = read_training_rows(args.data, SFTRow, "output", task_path)
    base = base_config(args.student)
    _, config, tokenizer = base
    check_labels(task_path, task, tokenizer)
    args.lr, args.batch_size, args.epochs, args.max_steps = choose_settings(
        "sft", config, rows, args.lr, args.batch_size, args.epochs, args.max_steps
    )
    max_train = args.max_steps and args.max_steps * args.batch_size
    train, dev = split_rows(args.data, rows, args.seed, max_dev=args.dev_rows, max_train=max_train)
    passes = 1  # of the original rows in `train`
    if args.swap_noise:
        passes = passes_over(len(train), epochs=args.epochs, max_steps=args.max_steps, batch_size=args.batch_size)
        train = swap_label_rows(
            train, task, prompt="input", label="output", share=args.swap_noise, passes=passes, seed=args.seed
        )
    run = check_run(
        "sft",
        args.save_dir,
        student=args.student,
        data=args.data,
        settings=vars(args),
        resume=args.resume_from_checkpoint,
        overwrite=args.overwrite,
        inputs={"task": task_path},
    )

    # Token ids, from the same prompt builder as in inference.
    train, dropped = encode(tokenizer, train, args.max_len, "input", "output")
    dev, dropped_dev = encode(tokenizer, dev, args.max_len, "input", "output")
    record = describe(tokenizer, train, dropped, dropped_dev)

    # The student. Nothing is written into the folder before start_run.
    start_run(run)
    micro_batch = plan_micro_batch(
        train,
        args.student,
        config,
        args.precision,
        batch_size=args.batch_size,
        micro_batch=args.micro_batch,
        lora_r=args.lora_r,
        max_vram_gb=args.max_vram_gb,
    )
    model, tokenizer = load_student(args.student, args.precision, base)

    # TRL's trainer, extended by StudentTrainer. Imported late: it takes seconds, and bad rows are reported sooner.
    from trl import SFTConfig, SFTTrainer

    from distill.train.trainer import StudentTrainer

    class Trainer(StudentTrainer, SFTTrainer):
        pass

    config = SFTConfig(
        **training_arguments(
            args.save_dir,
            rows=len(train),
            epochs=args.epochs / passes,
            max_steps=args.max_steps,
            batch_size=args.batch_size,
            micro_batch=micro_batch,
            learning_rate=args.lr,
            eval_steps=args.eval_steps,
            evaluate=bool(dev),
            best_metric=best_metric(bool(task), learns_text=True),
            precision=model.precision,
            seed=args.seed,
        ),
        max_length=None,  # encode() has dropped rows that are too long
        shuffle_dataset=False,  # the sampler shuffles
    )
    trainer = Trainer(
        model=with_lora(model, args.student, args.lora_r, args.seed),
        args=config,
        train_dataset=dataset(train, "input_ids", "labels"),
        eval_dataset=dataset(dev, "input_ids", "labels"),
        processing_class=tokenizer,
        train_rows=train,
        dev_rows=dev,
        task=task,
    )
    run_training(trainer, run, record)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "sft")
    add_swap_argument(parser)
    cli(main, parser)
