"""Direct preference optimisation: rows {"prompt", "chosen", "rejected"} -> an adapter folder.

    python dpo_train.py --student Qwen/Qwen2.5-3B-Instruct --data data/creditmix_dpo.jsonl \
        --save_dir runs/creditmix_dpo --init_adapter runs/creditmix_sft
    python dpo_train.py --student smollm2-135m --data data/creditmix_dpo.jsonl --save_dir runs/try --max_steps 20  # CPU

The reference is the base model with the adapter off, or with --init_adapter a frozen copy of that adapter; its
log-probs are computed once, before training.
"""

import argparse
import sys
from pathlib import Path

from common import completion_ids, label_classes, prompt_ids
from distill.files import UserError, between, cli, positive, read_json
from distill.model.hub import adapter_base
from distill.tasks.augment import add_noise_argument, noisy_copies, prompts_of
from distill.train.arguments import add_arguments, training_arguments
from distill.train.data import dataset, describe, drop_long, read_training_rows, split_for
from distill.train.run import run_training
from distill.train.run_folder import start_run
from distill.train.student import load_student, lora, lora_config
from distill.train.trainer import trainer_class


def main(args):
    rows, task = read_training_rows(args, {"prompt": str, "chosen": str, "rejected": str}, "chosen")
    if task:
        label_classes(args.data, rows, "rejected", task)
    for i, row in enumerate(rows, 1):
        if row["chosen"] == row["rejected"]:
            raise UserError(f"{args.data}: row {i}: fields 'chosen' and 'rejected' are equal; expected two answers")
    if args.init_adapter:
        if (base := adapter_base(args.init_adapter)) != args.student:
            raise UserError(f"{args.init_adapter}: trained on {base}; expected {args.student}")
        # it goes on with the rank that it has
        args.lora_r = read_json(args.init_adapter / "adapter_config.json").get("r", args.lora_r)
    train, dev = split_for(args, rows)
    train, passes = noisy_copies(args, train, "prompt", "chosen", task)
    record = start_run(args, "dpo")
    model, tokenizer = load_student(args, train)
    train, dropped = pairs(tokenizer, train, args.max_len)
    dev, dropped_dev = pairs(tokenizer, dev, args.max_len)
    told = describe(tokenizer, train, dropped, dropped_dev)
    reference = f"a frozen copy of {args.init_adapter}" if args.init_adapter else f"{args.student} with the adapter off"
    print(f"reference: {reference}, log-probs computed once")

    import torch
    from trl import DPOConfig, DPOTrainer

    options = training_arguments(args, model, train, dev, task, passes) | {
        "beta": args.beta,
        "loss_type": ["sigmoid", "sft"] if args.sft_weight else ["sigmoid"],
        "loss_weights": [1.0, args.sft_weight] if args.sft_weight else None,
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": 64 if torch.cuda.is_available() else 8,  # no gradients, so little memory
        "max_length": None,
    }

    class Pretokenized(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):  # the ids that serving sees, from common's prompt builder
            return dataset

    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    trainer = trainer_class(Pretokenized, task, dev)(
        # a PeftModel would make TRL copy its adapter as the reference, which is right only with --init_adapter
        model=lora(model, args, args.init_adapter) if args.init_adapter else model,
        peft_config=None if args.init_adapter else lora_config(args, model),
        args=DPOConfig(**options),
        train_dataset=dataset(train, *columns),
        eval_dataset=dataset(dev, *columns),
        processing_class=tokenizer,
    )
    trainer.add_callback(chosen_watch())
    run_training(trainer, args, task, dev, {**record, **told, "reference": reference}, prompts_of(train))


def pairs(tokenizer, rows, max_len):
    """Rows with prompt_ids, chosen_ids and rejected_ids, and the number dropped because either is too long."""
    texts = [r["prompt"] for r in rows]
    prompts = prompt_ids(tokenizer, texts)
    chosen, rejected = (
        completion_ids(tokenizer, texts, [r[answer] for r in rows], prompts) for answer in ("chosen", "rejected")
    )
    out, lengths = [], []
    for row, p, good, bad in zip(rows, prompts, chosen, rejected, strict=True):
        shown = {"prompt_ids": p, "input_ids": p + good, "labels": [-100] * len(p) + good}
        out.append({**row, **shown, "chosen_ids": good, "rejected_ids": bad})
        lengths.append(len(p) + max(len(good), len(bad)))
    return drop_long(out, lengths, max_len)


def chosen_watch():
    """A callback that warns when the chosen answers themselves grow less likely, which the margin hides."""
    from transformers import TrainerCallback

    class ChosenWatch(TrainerCallback):
        first, warned = None, False

        def on_log(self, args, state, control, logs=None, **kwargs):
            now = (logs or {}).get("logps/chosen")
            if now is None:
                return
            self.first = now if self.first is None else self.first
            if now < self.first - 1 and not self.warned:
                self.warned = True
                print(
                    f"warning: step {state.global_step}: the chosen answers' log-prob fell from {self.first:.2f} to "
                    f"{now:.2f}; --sft_weight 1 or a smaller --lr holds it",
                    file=sys.stderr,
                )

    return ChosenWatch()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "data/creditmix_dpo.jsonl", "runs/creditmix_dpo", 1e-4)
    add_noise_argument(parser)
    parser.add_argument("--beta", type=positive(float), default=0.3, help="how close to the reference (default: 0.3)")
    parser.add_argument(
        "--sft_weight",
        type=between(float, 0, 1000),
        default=1.0,
        help="of an SFT term that holds the chosen answers (default: 1)",
    )
    parser.add_argument("--init_adapter", type=Path, help="start from this adapter; it is then the reference too")
    cli(main, parser)
