"""What a trainer reads: rows checked, split, tokenised as they are scored, and described before a run begins."""

from pathlib import Path

from common import (
    Task,
    completion_ids,
    dev_split,
    label_classes,
    label_trie,
    prompt_ids,
    prompt_of,
    row_hash,
    unit_hash,
)
from distill.files import FilledText, StrictModel, Text, UserError, printable, read_rows


def find_task_file(data: Path, given: Path | None = None) -> Path | None:
    """The label task of training rows: the file given, else NAME_task.json beside NAME_sft.jsonl, or None."""
    beside = data.with_name(data.stem.rsplit("_", 1)[0] + "_task.json")
    if given or beside.is_file():
        return given or beside
    print(f"no {beside}: free text, so no label scores and no calibration")
    return None


def check_labels(path: Path | None, task: Task | None, tokenizer) -> None:
    """UserError, naming the task file at `path`, for a label that cannot be an answer with this tokenizer."""
    if task is None:
        return
    try:
        label_trie(tokenizer, task.labels)
    except UserError as e:
        raise UserError(f"{path}: field 'labels': {e}") from None


class TrainingRow(StrictModel):
    """Fields that every route may have.

    copy_of: hash of the prompt that augmentation changed. schema_sha256: of the JSON Schema that the prompt asks for.
    """

    group: Text | None = None
    copy_of: Text | None = None
    schema_sha256: Text | None = None


class SFTRow(TrainingRow):
    input: FilledText
    output: FilledText


class KDRow(TrainingRow):
    input: FilledText
    teacher_output: Text | None = None
    teacher_probs: dict | None = None
    output: Text | None = None


class DPORow(TrainingRow):
    prompt: FilledText
    chosen: FilledText
    rejected: FilledText


def read_training_rows(
    path: Path, model: type[TrainingRow], answer: str, task_path: Path | None
) -> tuple[list[dict], Task | None]:
    """Rows of a training file and their label task, or None for free text.

    answer: the field whose values must be labels of the task, where they are not empty.
    Each row gets "row_number" (from 1) and "hashes", what an evaluation compares with its own rows: the hash of its
    prompt and, for a row that augmentation made, of its original's. Copies made later inherit both.
    Errors: UserError for a malformed row or an answer that is no label.
    """
    rows = read_rows(path, model)
    for i, row in enumerate(rows, 1):
        row["row_number"] = i
        row["hashes"] = [row_hash(prompt_of(row))] + ([row["copy_of"]] if row.get("copy_of") else [])
    if task_path is None:
        return rows, None
    task = Task.load(task_path)
    label_classes(path, rows, answer, task, unknown=(None, ""))  # a teacher may still have to give those
    return rows, task


def split_rows(
    path: Path, rows: list[dict], seed: int, *, max_dev: int | None = None, max_train: int | None = None
) -> tuple[list[dict], list[dict]]:
    """(rows to train on, development rows), at most as many of either as asked.

    max_dev: default 1000 on a GPU, 100 on a CPU. path: of the rows, for the error message.
    Errors: UserError when no row is left to train on.
    """
    import torch

    max_dev = max_dev or (1000 if torch.cuda.is_available() else 100)
    train, dev = dev_split(rows, seed, limit=max_dev)
    if not train:
        raise UserError(f"{path}: all {len(rows)} rows fell into the development split; expected more rows")
    if max_train:
        train = sorted(train, key=lambda r: unit_hash(seed, prompt_of(r)))[:max_train]
    return train, dev


def encode(tokenizer, rows: list[dict], max_len: int, prompt: str, *answers: str) -> tuple[list[dict], dict[str, int]]:
    """Token ids of a prompt and of one or more answers to it, by the same prompt builder that inference uses.

    prompt, answers: names of fields. Each row gets
        "prompt_ids", and "<answer>_ids" for each answer, the end of the turn included
        "input_ids" and "labels" of prompt and first answer, -100 where nothing is trained
        "texts"     [(ids of prompt and answer, number of answer ids)] for each answer: what the memory forecast reads
        "answer"    the first answer as text: what development scores are compared with
    Returns the rows of at most max_len tokens, and {reason: rows dropped}. Errors: UserError when all are dropped.
    """
    texts = [r[prompt] for r in rows]
    prompts = prompt_ids(tokenizer, texts)
    ids = [completion_ids(tokenizer, texts, [r[field] for r in rows], prompts) for field in answers]
    encoded = [
        {
            **row,
            "prompt_ids": p,
            **{f"{field}_ids": a for field, a in zip(answers, own, strict=True)},
            "input_ids": p + own[0],
            "labels": [-100] * len(p) + own[0],
            "texts": [(p + a, len(a)) for a in own],
            "answer": row[answers[0]],
        }
        for row, p, *own in zip(rows, prompts, *ids, strict=True)
    ]
    kept = [row for row in encoded if longest_text([row]) <= max_len]
    if rows and not kept:
        shortest = min(longest_text([row]) for row in encoded)
        raise UserError(f"all {len(rows)} rows are longer than --max_len {max_len}; the shortest has {shortest} tokens")
    return kept, {f"longer than {max_len} tokens": len(rows) - len(kept)}


def longest_text(rows: list[dict]) -> int:
    """Tokens of the longest text of encoded rows."""
    return max(len(ids) for row in rows for ids, _ in row["texts"])


def describe(tokenizer, rows: list[dict], dropped: dict[str, int], dropped_dev: dict[str, int]) -> dict:
    """Print what a run trains on: lengths, dropped rows, and one row with its trained tokens marked.

    Returns the same as fields of run.json.
    """
    lengths = sorted(len(r["input_ids"]) for r in rows)
    drops = [f"{n} {why}" for why, n in dropped.items() if n]
    gone = ", ".join(drops + [f"{n} development rows {why}" for why, n in dropped_dev.items() if n])
    at = {q: lengths[min(int(len(lengths) * q / 100), len(lengths) - 1)] for q in (50, 95, 99, 100)}
    print(f"{len(rows)} rows; tokens per row: median {at[50]}, 95% {at[95]}, max {at[100]}; {gone or 'none'} dropped")
    n = rows[0]["labels"].count(-100)
    prompt, trained = tokenizer.decode(rows[0]["input_ids"][:n]), tokenizer.decode(rows[0]["input_ids"][n:])
    print(printable(f"one row, the trained tokens between >>> and <<<:\n{prompt}>>>{trained}<<<"))
    return {
        "rows_dropped": dropped,
        "dev_rows_dropped": dropped_dev,
        "tokens": {"median": at[50], "p95": at[95], "p99": at[99], "longest": at[100]},
        "trained": trained,
        "schema_sha256": sorted({r["schema_sha256"] for r in rows if r.get("schema_sha256")}),
    }


def dataset(rows: list[dict], *columns: str):
    """The columns of encoded rows as a datasets.Dataset, in the same order; None for no rows."""
    from datasets import Dataset

    return Dataset.from_dict({c: [r[c] for r in rows] for c in columns}) if rows else None
