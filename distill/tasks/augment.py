"""Swap augmentation: copies of training rows in which some fields take their values from other training rows.

Rows of one customer, and documents of one template, are nearly equal: a model soon knows them by heart. Trained without
augmentation, the embedded student names 82 % of its training labels and 63 % of other customers'. In a copy few rows
come back whole, while every field keeps its distribution. (SCARF, arXiv 2106.15147, corrupts features in this way and
draws from all rows.) The relations between fields get lost, and label scores become overconfident; the calibration,
fitted on rows as they are, corrects the second.

Label rows (`swap_label_rows`) are copied while training, anew for each pass, and draw from rows of the same label.
Documents (`swap_document_values`) are copied by idp_prepare.py, in the text and in the gold at once. A copy inherits
the other fields of its original, among them the hashes that an evaluation compares with its own rows.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from common import Task
from distill.files import UserError
from distill.tasks.creditmix import split_fields

T = TypeVar("T")


def changed_copies(rows: Sequence[T], passes: int, change: Callable[[T], T]) -> list[T]:
    """`passes` copies of all rows, one pass after the other, each row changed anew."""
    return [change(row) for _ in range(passes) for row in rows]


def maybe_swap(value: T, pool: Sequence[T], share: float, rng: random.Random) -> T:
    """A value drawn from `pool` with probability `share`, else `value`."""
    return rng.choice(pool) if rng.random() < share else value


# ---------------------------------------------------------------------------------------------------------------------
# Label rows: 'Key: value, Key: value' inside the prompt of a label task


def swap_label_rows(
    rows: list[dict], task: Task | None, *, prompt: str, label: str, share: float, passes: int, seed: int
) -> list[dict]:
    """`passes` copies of the rows; a field takes the value of a row with the same label with probability `share`.

    rows: dicts with row[prompt], a prompt of `task` around 'Key: value, Key: value', and row[label]. Only row[prompt]
    changes. The same seed gives the same copies.
    Errors: UserError without a label task, or with the first text that has no fields.
    """
    if not task:
        raise UserError("--swap_augmentation: expected a label task; these rows have no task file")
    before, after = task.template.split("{input}")

    def write(fields):
        return task.prompt(", ".join(f"{name}: {value}" for name, value in fields))

    parsed, pool = [], {}
    for row in rows:
        text = row[prompt][len(before) : len(row[prompt]) - len(after)]
        fields = split_fields(text)
        if write(fields) != row[prompt]:
            raise UserError(f"--swap_augmentation: expected texts like 'Key: value, Key: value', got {text[:60]!r}")
        for name, value in fields:
            pool.setdefault((row[label], name), []).append(value)
        parsed.append((row, fields))
    rng = random.Random(seed)

    def change(parsed_row):
        row, fields = parsed_row
        swapped = [(name, maybe_swap(value, pool[row[label], name], share, rng)) for name, value in fields]
        return {**row, prompt: write(swapped)}

    return changed_copies(parsed, passes, change)


# ---------------------------------------------------------------------------------------------------------------------
# Documents with their gold JSON


def swap_document_values(rows: list[dict], *, copies: int, rng: random.Random, share: float = 0.5) -> list[dict]:
    """`copies` copies of documents with their gold; a value takes that of another document with probability `share`.

    From few documents a model learns where each template puts a value; when the values vary, it has to learn what a
    value looks like.
    rows: dicts with "document" (text) and "gold" (JSON); both change, the other fields are kept.
    """
    pool = shown_values(rows)
    return changed_copies(rows, copies, lambda row: swap_values(row, pool, rng, share))


def swap_values(row: dict, pool: dict[str, list[str]], rng: random.Random, share: float = 0.5) -> dict:
    """A copy of one document row; only values that the document shows letter for letter are swapped.

    All places of the document that show the value change. A swap that would remove the value of another field is
    skipped. pool: the result of `shown_values`.
    """
    for key in pool:
        if shows(row, key):
            gold = row["gold"]
            value = maybe_swap(gold[key], pool[key], share, rng)
            document = whole_value(gold[key]).sub(lambda _, value=value: value, row["document"])
            changed = {**row, "document": document, "gold": {**gold, key: value}}
            row = changed if all(shows(changed, k) for k in gold if shows(row, k)) else row
    return row


def shown_values(rows: list[dict]) -> dict[str, list[str]]:
    """{field: the values of all rows whose documents show them}."""
    pool = {}
    for row in rows:
        for key in row["gold"]:  # shows() is False for the elements of a list
            if shows(row, key):
                pool.setdefault(key, []).append(row["gold"][key])
    return pool


def shows(row: dict, key: str) -> bool:
    """Whether the document contains the gold's value as it is. Up to three letters may match by chance: False."""
    value = row["gold"].get(key) if isinstance(row["gold"], dict) else None
    return isinstance(value, str) and len(value) > 3 and bool(whole_value(value).search(row["document"]))


def whole_value(value: str) -> re.Pattern:
    """A pattern that matches the value, but not inside a longer word, number or date (RM12.50 contains 12.50)."""
    before = r"(?<![\d.,/-])" if value[0].isdigit() else r"(?<!\w)"
    after = r"(?!\d|[.,/-]\d)" if value[-1].isdigit() else r"(?!\w)"
    return re.compile(before + re.escape(value) + after)
