"""Knowledge distillation: a teacher's answers or label probabilities -> an adapter folder.

    python kd_train.py --student Qwen/Qwen2.5-3B-Instruct --data data/creditmix_kd.jsonl --save_dir runs/creditmix_kd
    python kd_train.py --student smollm2-135m --data data/creditmix_kd.jsonl --save_dir runs/try --max_steps 20  # CPU

Rows {"input", "teacher_output"} are trained on as text (sequence KD). Where rows of a label task carry "teacher_probs",
the loss is on the label distribution itself, through the scores that inference ranks by.
"""

import argparse

from common import UserError, cli, label_trie, load_base, prompt_ids
from training import (
    add_arguments,
    dataset,
    describe,
    encode,
    lora,
    read_training_rows,
    run_training,
    split_for,
    start_run,
    trainer_class,
    training_arguments,
)


def main(args):
    fields = {"input": str, "teacher_output": str}
    rows, task = read_training_rows(args, fields, "teacher_output", {"teacher_probs": dict, "output": str})
    by_distribution = task is not None and any(r.get("teacher_probs") for r in rows)
    if by_distribution:
        add_distributions(args.data, rows, task)
    train, dev = split_for(args, rows)
    model, tokenizer = load_base(args.student, args.precision)
    start_run(args, "kd")
    train, dropped = encode(tokenizer, train, args.max_len, "input", "teacher_output")
    dev, _ = encode(tokenizer, dev, args.max_len, "input", "teacher_output")
    told = describe(tokenizer, train, dropped)

    from trl import SFTConfig, SFTTrainer

    kind = trainer_class(SFTTrainer, task, dev)
    columns = ["input_ids", "labels"]
    options = training_arguments(args, model, train, dev)
    if by_distribution:
        print(f"loss: label distribution, temperature {args.temperature}, gold share {args.alpha}")
        kind = distribution_trainer(kind, label_trie(tokenizer, task.labels), args)
        for row in train + dev:
            row["prompt_ids"] = prompt_ids(tokenizer, [row["input"]])[0]
        columns = ["prompt_ids", "teacher", "gold"]
        options |= {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = kind(
        model=lora(model, args),
        args=SFTConfig(**options, max_length=None, shuffle_dataset=False),
        train_dataset=dataset(train, *columns),
        eval_dataset=dataset(dev, *columns),
        processing_class=tokenizer,
    )
    record = {"route": "kd", **told, "loss": "label distribution" if by_distribution else "sequence"}
    run_training(trainer, args, task, dev, record, [r["input"] for r in train])


def add_distributions(path, rows, task):
    """Set row["teacher"], probabilities in the task's order, and row["gold"], a class number or -1 where unknown.

    Error: UserError naming the row whose probabilities are none.
    """
    for i, row in enumerate(rows, 1):
        p = row.get("teacher_probs") or {row["teacher_output"]: 1.0}
        place = f"{path}: row {i}: field 'teacher_probs'"
        if set(p) - set(task.labels):
            raise UserError(f"{place}: {sorted(set(p) - set(task.labels))} are no labels; expected {task.labels}")
        values = [p.get(label, 0.0) for label in task.labels]
        if not all(isinstance(v, int | float) and 0 <= v <= 1 for v in values) or abs(sum(values) - 1) > 0.01:
            raise UserError(f"{place}: {values}: expected numbers in [0, 1] that sum to 1")
        if "output" in row and row["output"] not in task.labels:
            raise UserError(f"{path}: row {i}: field 'output': {row['output']!r} is no label; expected {task.labels}")
        row["teacher"] = [v / sum(values) for v in values]
        row["gold"] = task.labels.index(row["output"]) if row.get("output") else -1


def distribution_loss(scores, teacher, gold, temperature, alpha):
    """(1 - alpha) t^2 KL(teacher^(1/t) || softmax(scores / t)) + alpha cross-entropy with gold (Hinton et al. 2015).

    scores [N, L] label log-likelihoods, teacher [N, L] probabilities, gold [N] classes or -1, which has no share.
    """
    import torch
    from torch.nn.functional import cross_entropy, kl_div

    soft = torch.softmax(teacher.clamp(min=1e-6).log() / temperature, -1)
    student = torch.log_softmax(scores / temperature, -1)
    distilled = kl_div(student, soft, reduction="none").sum(-1) * temperature**2
    share = alpha * (gold >= 0)
    return ((1 - share) * distilled + share * cross_entropy(scores, gold.clamp(min=0), reduction="none")).mean()


def distribution_trainer(trainer, trie, args):
    """The trainer with the loss on label scores; prompts of a batch share their head, labels their prompt."""
    import torch

    from trees import pack_prompts

    class Distribution(trainer):
        def __init__(self, *a, **kw):
            pad = kw["processing_class"].pad_token_id

            def collate(rows):
                batch = pack_prompts([r["prompt_ids"] for r in rows], trie, pad)
                batch["teacher"] = torch.tensor([r["teacher"] for r in rows])
                batch["gold"] = torch.tensor([r["gold"] for r in rows])
                return batch

            super().__init__(*a, data_collator=collate, **kw)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            teacher, gold, at = inputs.pop("teacher"), inputs.pop("gold"), inputs.pop("label_logits_at")
            scores = trie.scores(model(**inputs, use_cache=False).logits[at])
            return distribution_loss(scores, teacher, gold, args.temperature, args.alpha)

    return Distribution


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "data/creditmix_kd.jsonl", "runs/creditmix_kd", 2e-4)
    parser.add_argument("--temperature", type=float, default=1.0, help="softens both distributions (default: 1)")
    parser.add_argument("--alpha", type=float, default=0.0, help="share of the gold label in the loss (default: 0)")
    cli(main, parser.parse_args())
