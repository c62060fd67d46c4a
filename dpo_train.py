"""Direct preference optimisation: rows {"prompt", "chosen", "rejected"} -> an adapter folder.

    python dpo_train.py --student Qwen/Qwen2.5-3B-Instruct --data data/creditmix_dpo.jsonl \
        --save_dir runs/creditmix_dpo --init_adapter runs/creditmix_sft
    python dpo_train.py --student smollm2-135m --data data/creditmix_dpo.jsonl --save_dir runs/try --max_steps 20  # CPU

The reference is the base model without the adapter, or with --init_adapter a frozen copy of that adapter. Its log-probs
are computed once, before training.
"""

import argparse
import sys
from pathlib import Path

from common import add_adapter, label_classes
from distill.evaluate import trained_rows
from distill.files import UserError, between, cli, positive, read_json
from distill.model.hub import adapter_base, base_config
from distill.tasks.augment import swap_label_rows
from distill.train.arguments import add_arguments, add_swap_argument, choose_settings, passes_over, training_arguments
from distill.train.data import (
    DPORow,
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
from distill.train.student import load_student, lora_config


def main(args):
    # The rows, and the development rows that choose the checkpoint and fit the calibration.
    task_path = find_task_file(args.data, args.task)
    rows, task = read_training_rows(args.data, DPORow, "chosen", task_path)
    check_pairs(args.data, rows, task)
    if args.init_adapter:
        if (trained_on := adapter_base(args.init_adapter)) != args.student:
            raise UserError(f"{args.init_adapter}: trained on {trained_on}; expected {args.student}")
        # the adapter keeps its rank
        args.lora_r = read_json(args.init_adapter / "adapter_config.json").get("r", args.lora_r)
    base = base_config(args.student)
    _, config, tokenizer = base
    check_labels(task_path, task, tokenizer)
    args.lr, args.batch_size, args.epochs, args.max_steps = choose_settings(
        "dpo", config, rows, args.lr, args.batch_size, args.epochs, args.max_steps
    )
    max_train = args.max_steps and args.max_steps * args.batch_size
    train, dev = split_rows(args.data, rows, args.seed, max_dev=args.dev_rows, max_train=max_train)
    passes = 1  # of the original rows in `train`
    if args.swap_noise:
        passes = passes_over(len(train), epochs=args.epochs, max_steps=args.max_steps, batch_size=args.batch_size)
        train = swap_label_rows(
            train, task, prompt="prompt", label="chosen", share=args.swap_noise, passes=passes, seed=args.seed
        )
    run = check_run(
        "dpo",
        args.save_dir,
        student=args.student,
        data=args.data,
        settings=vars(args),
        resume=args.resume_from_checkpoint,
        overwrite=args.overwrite,
        inputs={"task": task_path, "init_adapter": args.init_adapter},
    )

    # Token ids, by the prompt builder that inference uses: prompt_ids, chosen_ids and rejected_ids.
    train, dropped = encode(tokenizer, train, args.max_len, "prompt", "chosen", "rejected")
    dev, dropped_dev = encode(tokenizer, dev, args.max_len, "prompt", "chosen", "rejected")
    record = describe(tokenizer, train, dropped, dropped_dev)
    reference = f"a frozen copy of {args.init_adapter}" if args.init_adapter else f"{args.student} with the adapter off"
    print(f"reference: {reference}, log-probs computed once")

    # The student. start_run is the first to write into the folder.
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
    precision, peft_config = model.precision, None
    if args.init_adapter:  # TRL copies the adapter of a PeftModel as the reference
        model = add_adapter(model, args.init_adapter, trainable=True)
    else:  # and switches a fresh one off for it
        peft_config = lora_config(model, args.student, args.lora_r)

    # TRL's trainer, with what StudentTrainer adds. These imports take seconds, so bad rows are reported before.
    import torch
    from trl import DPOConfig

    config = DPOConfig(
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
            best_metric="eval_label_log_loss" if task else "eval_loss",  # what inference ranks by
            precision=precision,
            seed=args.seed,
        ),
        beta=args.beta,
        loss_type=["sigmoid", "sft"] if args.sft_weight else ["sigmoid"],
        loss_weights=[1.0, args.sft_weight] if args.sft_weight else None,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=64 if torch.cuda.is_available() else 8,  # no gradients, so little memory
        max_length=None,  # encode() has dropped what is too long
    )
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    trainer = dpo_trainer_class()(
        model=model,
        peft_config=peft_config,
        args=config,
        train_dataset=dataset(train, *columns),
        eval_dataset=dataset(dev, *columns),
        processing_class=tokenizer,
        train_rows=train,
        dev_rows=dev,
        task=task,
    )
    trainer.add_callback(chosen_watch())
    # the rows of the first adapter were trained on too
    earlier_hashes = args.init_adapter and trained_rows(args.init_adapter)
    run_training(trainer, run, {**record, "reference": reference}, earlier_hashes or ())


def check_pairs(path, rows, task):
    """UserError for a pair of equal answers, or for a rejected answer that is no label of the task."""
    if task:
        label_classes(path, rows, "rejected", task)
    for i, row in enumerate(rows, 1):
        if row["chosen"] == row["rejected"]:
            raise UserError(f"{path}: row {i}: fields 'chosen' and 'rejected' are equal; expected two answers")


def dpo_trainer_class():
    """TRL's DPOTrainer for rows that have token ids already, with what StudentTrainer adds."""
    from contextlib import contextmanager

    from accelerate.utils import gather_object
    from tqdm import tqdm
    from trl import DPOTrainer

    from distill.train.trainer import StudentTrainer

    class Trainer(StudentTrainer, DPOTrainer):
        def _prepare_dataset(self, dataset, *_):  # encode() has tokenised it, by the prompt builder of inference
            return dataset

        def _precompute_ref_logps(self, dataset, name, batch_size):  # DPOTrainer.__init__ calls it
            self.share_prefixes()
            if self.args.world_size == 1:
                return super()._precompute_ref_logps(dataset, name, batch_size)
            # TRL leaves them in a file in the first process's own temporary folder, where no other finds them
            rank, world, found = self.args.process_index, self.args.world_size, []
            own = range(rank, len(dataset), world)
            for part in tqdm([own[i : i + batch_size] for i in range(0, len(own), batch_size)], "reference log-probs"):
                batch = self._prepare_inputs(self.data_collator([dataset[i] for i in part]))
                chosen, rejected = self.compute_ref_log_probs(self.model, batch)
                found += zip(part, chosen.tolist(), rejected.tolist(), strict=True)
            found = sorted(gather_object(found))
            dataset = dataset.add_column("ref_chosen_logps", [c for _, c, _ in found])
            return dataset.add_column("ref_rejected_logps", [r for _, _, r in found])

        @contextmanager
        def part_of_batch(self, part, rows):
            weights = self.loss_weights
            self.loss_weights = part_weights(self.loss_types, weights, part, rows)
            try:
                yield
            finally:
                self.loss_weights = weights

    return Trainer


def part_weights(types, weights, part, rows):
    """Weights of DPO's terms for a part that counts by its rows: TRL's SFT term is a mean over the chosen tokens."""
    part_tokens, tokens = (sum(len(r["chosen_ids"]) for r in own) for own in (part, rows))
    share = part_tokens / tokens * len(rows) / len(part)
    return [w * share if t == "sft" else w for t, w in zip(types, weights, strict=True)]


def chosen_watch():
    """A callback that warns when the chosen answers themselves become less likely, which the margin hides."""
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
    add_arguments(parser, "dpo")
    add_swap_argument(parser)
    parser.add_argument("--beta", type=positive(float), default=0.3, help="how close to the reference (default: 0.3)")
    parser.add_argument(
        "--sft_weight",
        type=between(float, 0, 1000),
        default=1.0,
        help="weight of an SFT term on the chosen answers (default: 1)",
    )
    parser.add_argument("--init_adapter", type=Path, help="start from this adapter; it is then the reference too")
    cli(main, parser)
