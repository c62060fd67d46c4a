"""Knowledge distillation: a teacher's answers or label probabilities -> an adapter folder.

    python kd_train.py --student Qwen/Qwen2.5-3B-Instruct --data data/creditmix_kd.jsonl --save_dir runs/creditmix_kd
    python kd_train.py --student smollm2-135m --data data/creditmix_kd.jsonl --save_dir runs/try --max_steps 20  # CPU

Rows {"input", "teacher_output"} are trained on as text (sequence KD). Where rows of a label task carry "teacher_probs",
the loss is on the label distribution itself, through the scores that inference ranks by. For rows of a label task that
have no teacher_output, --teacher is a model, scored as in inference, or gradient-boosting on the rows' own fields.
"""

import argparse
import gc

import numpy as np

from common import (
    Calibration,
    LabelScorer,
    UserError,
    cli,
    label_classes,
    label_trie,
    load_model,
    positive,
)
from training import (
    add_arguments,
    dataset,
    describe,
    encode,
    load_student,
    lora,
    read_training_rows,
    run_training,
    split_for,
    start_run,
    trainer_class,
    training_arguments,
)


def main(args):
    optional = {"teacher_output": str, "teacher_probs": dict, "output": str}
    rows, task = read_training_rows(args, {"input": str}, "teacher_output", optional)
    if task is None and any(r.get("teacher_probs") for r in rows):
        raise UserError(f"{args.data}: rows have teacher_probs but there is no task file; expected --task")
    untaught = [(i, r) for i, r in enumerate(rows, 1) if not r.get("teacher_output")]
    if untaught and not (args.teacher and task):
        where = f"{args.data}: row {untaught[0][0]}: field 'teacher_output' is missing"
        raise UserError(f"{where}; expected one, or a label task and --teacher")
    if untaught:
        teach(args, [r for _, r in untaught], task)
    by_distribution = task is not None and any(r.get("teacher_probs") for r in rows)
    if by_distribution:
        add_distributions(args.data, rows, task)
    start_run(args, "kd")
    train, dev = split_for(args, rows)
    model, tokenizer = load_student(args, train)
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
            row["prompt_ids"] = row["input_ids"][: row["labels"].count(-100)]
        columns = ["prompt_ids", "teacher", "gold"]
        options |= {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = kind(
        model=lora(model, args),
        args=SFTConfig(**options, max_length=None, shuffle_dataset=False),
        train_dataset=dataset(train, *columns),
        eval_dataset=dataset(dev, *columns),
        processing_class=tokenizer,
    )
    loss = "label distribution" if by_distribution else "sequence"
    record = {"route": "kd", **told, "teacher": args.teacher, "loss": loss}
    run_training(trainer, args, task, dev, record, [r["input"] for r in train])


def teach(args, rows, task):
    """Give each row "teacher_probs" and "teacher_output" by args.teacher, which is gone before the student loads."""
    import torch

    if args.teacher == "gradient-boosting":
        from creditmix_prepare import customer, out_of_fold

        before, behind = task.template.split("{input}")
        if not all(r.get("output") for r in rows):
            raise UserError(f"{args.data}: --teacher gradient-boosting learns from field 'output'; a row has none")
        label_classes(args.data, rows, "output", task)
        texts = [r["input"].removeprefix(before).removesuffix(behind) for r in rows]
        own = zip(rows, texts, strict=True)
        fields = [{"question": t, "answer": r["output"], "group": r.get("group") or customer(t)} for r, t in own]
        probs = out_of_fold(fields, task.labels, args.seed)  # no row is taught by a model that saw its customer
    else:
        model, tokenizer = load_model(args.teacher, args.precision)
        scorer = LabelScorer(model, tokenizer, task.labels, task.null_prompts())
        raw = scorer.score([r["input"] for r in rows], progress=True)
        scores = Calibration.load(args.teacher, task)(raw, scorer.prior(task))
        probs = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
        del model, scorer  # teacher and student never share the memory
        gc.collect()
        torch.cuda.empty_cache()
    for row, p in zip(rows, probs, strict=True):
        row["teacher_probs"] = dict(zip(task.labels, map(float, p), strict=True))
        row["teacher_output"] = task.labels[int(np.argmax(p))]
    print(f"{args.teacher} taught {len(rows)} rows")


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
        if row.get("output") is not None and row["output"] not in task.labels:
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
        needs_trees = True

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
    parser.add_argument("--teacher", help="model folder, hub id or gradient-boosting, for rows without teacher_output")
    parser.add_argument("--temperature", type=positive(float), default=1.0, help="softens both (default: 1)")
    parser.add_argument("--alpha", type=float, default=0.0, help="share of the gold label in the loss (default: 0)")
    cli(main, parser.parse_args())
