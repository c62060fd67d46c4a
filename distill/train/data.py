"""What a trainer reads: rows checked, split, tokenised as they are scored, and shown before a run begins."""

from common import Task, completion_ids, dev_split, label_classes, prompt_ids, prompt_of, task_file, unit_hash
from distill.files import UserError, read_rows


def read_training_rows(args, fields, answer, optional=None):
    """Rows of args.data and the label task they belong to, or None for free text.

    Error: UserError for an answer that is no label.
    """
    rows = read_rows(args.data, fields, {"group": str, **(optional or {})})
    path = task_file(args)
    if not args.task and not path.is_file():
        print(f"no {path}: free text, so no label scores and no calibration")
        return rows, None
    task = Task.load(path)
    label_classes(args.data, rows, answer, task, unknown=(None, ""))  # which a teacher has yet to give
    return rows, task


def split_for(args, rows):
    """(rows to train on, development rows): no more of either than the run can use."""
    import torch

    train, dev = dev_split(rows, args.seed)
    if not train:
        raise UserError(f"{args.data}: all {len(rows)} rows fell into the development split; expected more rows")
    most = args.dev_rows or (1000 if torch.cuda.is_available() else 100)
    if args.max_steps:
        train = sorted(train, key=lambda r: unit_hash(args.seed, prompt_of(r)))[: args.max_steps * args.batch_size]
    return train, sorted(dev, key=lambda r: unit_hash(args.seed, prompt_of(r)))[:most]


def encode(tokenizer, rows, max_len, prompt, answer):
    """Rows with input_ids and labels (-100 where nothing is trained), and how many were dropped, by reason.

    Error: UserError when every row is too long.
    """
    prompts = prompt_ids(tokenizer, [r[prompt] for r in rows])
    answers = completion_ids(tokenizer, [r[prompt] for r in rows], [r[answer] for r in rows], prompts)
    return drop_long(
        [
            {**row, "prompt_ids": p, "input_ids": p + a, "labels": [-100] * len(p) + a}
            for row, p, a in zip(rows, prompts, answers, strict=True)
        ],
        [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)],
        max_len,
    )


def drop_long(rows, lengths, max_len):
    """Rows of at most max_len tokens, and how many were dropped, by reason. Error: UserError when it is all of them."""
    kept = [row for row, length in zip(rows, lengths, strict=True) if length <= max_len]
    if rows and not kept:
        shortest = min(lengths)
        raise UserError(f"all {len(rows)} rows are longer than --max_len {max_len}; the shortest has {shortest} tokens")
    return kept, {f"longer than {max_len} tokens": len(rows) - len(kept)}


def describe(tokenizer, rows, dropped, dropped_dev):
    """Print what is about to be trained on: lengths, drops, and one row with its trained tokens marked."""
    lengths = sorted(len(r["input_ids"]) for r in rows)
    drops = [f"{n} {why}" for why, n in dropped.items() if n]
    gone = ", ".join(drops + [f"{n} development rows {why}" for why, n in dropped_dev.items() if n])
    at = {q: lengths[min(int(len(lengths) * q / 100), len(lengths) - 1)] for q in (50, 95, 100)}
    print(f"{len(rows)} rows; tokens a row: median {at[50]}, 95% {at[95]}, longest {at[100]}; {gone or 'none'} dropped")
    n = rows[0]["labels"].count(-100)
    prompt, trained = tokenizer.decode(rows[0]["input_ids"][:n]), tokenizer.decode(rows[0]["input_ids"][n:])
    print(f"one row, the trained tokens between >>> and <<<:\n{prompt}>>>{trained}<<<")
    return {
        "rows_dropped": dropped,
        "dev_rows_dropped": dropped_dev,
        "tokens": {"median": at[50], "p95": at[95], "longest": at[100]},
        "trained": trained,
    }


def dataset(rows, *columns):
    from datasets import Dataset

    return Dataset.from_dict({c: [r[c] for r in rows] for c in columns}) if rows else None
