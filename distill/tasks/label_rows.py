"""Rows of a label task: read from CSV, JSON or JSONL by the task's columns, and chosen for training and evaluation.

Where a task file names no columns, the rows are {"question", "answer", "group"}.
"""

import csv
import io
from collections import Counter
from pathlib import Path

import numpy as np
from pydantic import Field, create_model

from common import Task, label_classes, unit_hash
from distill.files import FilledText, StrictModel, Text, UserError, placed_rows, read_text, validate
from distill.tasks.creditmix import NAME as CREDITMIX
from distill.tasks.creditmix import customer, read_csv

COLUMNS = {"text": "question", "label": "answer", "group": "group"}
BALANCE = ("none", "smallest")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_label_rows(path: str | Path, task: Task, columns: str = "six") -> tuple[list[dict], Counter]:
    """Rows {"question": text, "answer": label or None, "group": name} of a source, and a Counter of dropped rows.

    path: CSV, JSON or JSONL with the task's columns, or for CreditMix the public CSV. .gz too.
    columns: of the public CSV, "six" or "all".
    A row without a label has the answer None. Texts that occur with several labels are dropped.
    Errors: UserError naming file, line, field and what was expected.
    """
    if str(path).endswith((".csv", ".csv.gz")) and task.name == CREDITMIX and not task.columns:
        rows, dropped = read_csv(path, columns)
        label_classes(path, rows, "answer", task)
        return rows, dropped
    if columns != "six":
        raise UserError(f"{path}: --columns {columns}: expected the CSV of CreditMix")
    rows = read_columns(path, task.columns)
    field = (task.columns or COLUMNS).get("label")
    for row in rows:
        if row["answer"] not in (None, *task.labels):
            expected = f"{row['answer']!r} is no label; expected {task.labels}"
            raise UserError(f"{row['place']}: field '{field}': {expected}")
    first, contradictory = {}, {}
    for row in rows:
        if row["answer"]:
            other = first.setdefault(row["question"], row)
            if other["answer"] != row["answer"]:
                contradictory.setdefault(row["question"], (other, row))
    kept = [r for r in rows if not (r["answer"] and r["question"] in contradictory)]
    dropped = Counter()
    if contradictory:
        one, other = (f"{r['answer']!r} at {r['place']}" for r in next(iter(contradictory.values())))
        dropped[f"several labels for one text, for example {one}, {other}"] = len(rows) - len(kept)
    if not kept:
        raise UserError(f"{path}: no usable row; dropped: {dict(dropped)}")
    return [{name: r[name] for name in ("question", "answer", "group")} for r in kept], dropped


def read_test_rows(
    path: Path, task: Task, columns: str, data: Path, train: list[dict], allow_overlap: bool
) -> tuple[list[dict], Counter]:
    """`read_label_rows` of a test file; UserError where its texts are in `train`, rows of `data`, unless allowed."""
    rows, dropped = read_label_rows(path, task, columns)
    known = {r["question"] for r in train}
    seen = [r["question"] for r in rows if r["question"] in known]
    if seen and not allow_overlap:
        found = f"{len(seen)} of its {len(rows)} texts are training rows of {data}, for example {seen[0][:60]!r}"
        raise UserError(f"{path}: {found}; expected none (or --allow_overlap)")
    return rows, dropped


def read_columns(path: str | Path, columns: dict[str, str]) -> list[dict]:
    """Rows {"question", "answer", "group", "place"} of a file; place names file and line. Labels are not checked."""
    required = list(columns.values()) or [COLUMNS["text"]]
    model, rows = row_model(columns or COLUMNS), []
    for place, fields in read_fields(path, required):
        row = validate(place, fields, model)
        label, group = getattr(row, "label", None), getattr(row, "group", None)
        label = None if label is None else str(label).strip()
        group = customer(row.text) if group in (None, "") else str(group)
        rows.append({"question": row.text, "answer": label or None, "group": group, "place": place})
    return rows


def read_texts(path: str | Path, task: Task) -> tuple[list[dict], list[str]]:
    """(rows with all their fields, their texts) of CSV, JSON or JSONL (- for standard input). Error: UserError."""
    column = (task.columns or COLUMNS)["text"]
    model, placed = row_model({"text": column}), read_fields(path, [column])
    return [row for _, row in placed], [validate(place, row, model).text for place, row in placed]


def row_model(columns: dict[str, str]) -> type[StrictModel]:
    """The type of a row with the attributes of `columns` (text, label, group), read from the fields named there."""
    types = {"text": (FilledText, ...), "label": (Text | int | None, None), "group": (Text | int | None, None)}
    fields = {name: (types[name][0], Field(types[name][1], alias=alias)) for name, alias in columns.items()}
    return create_model("Row", __base__=StrictModel, **fields)


def read_fields(path: str | Path, required: list[str]) -> list[tuple[str, dict]]:
    """[(place, all fields of a row)] of CSV, JSON or JSONL (- for standard input); place names file and line.

    required: fields that the header of a CSV, or any row of JSON, must have. Error: UserError.
    """
    text = read_text(path)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}:{line}: a NUL byte; expected UTF-8 text")
    if str(path).endswith((".csv", ".csv.gz")) or (str(path) == "-" and text.lstrip()[0] not in "{["):
        return csv_fields(path, text, required)
    rows = placed_rows(path, text)
    for place, row in rows:
        validate(place, row, StrictModel)
    for name in required:
        if not any(name in row for _, row in rows):
            raise UserError(f"{path}: no row has the field '{name}'; expected one of {list(rows[0][1])}")
    return rows


def csv_fields(path: str | Path, text: str, required: list[str]) -> list[tuple[str, dict]]:
    """As `read_fields`, of the text of a CSV with a header. A quoted field may contain line breaks."""
    reader, rows = csv.reader(io.StringIO(text), strict=True), []
    try:
        header = [name.strip() for name in next(reader)]
        missing = next((name for name in required if name not in header), None)
        if missing:
            raise UserError(f"{path}:1: no column '{missing}'; expected one of {header}")
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{path}:1: column '{twice}' stands twice in the header; expected different names")
        line = reader.line_num + 1
        for cells in reader:
            place, line = f"{path}:{line}", reader.line_num + 1
            if cells and len(cells) != len(header):
                raise UserError(f"{place}: {len(cells)} fields; expected {len(header)}, as in the header")
            if cells:
                rows.append((place, dict(zip(header, cells, strict=True))))
    except csv.Error as e:
        raise UserError(f"{path}:{reader.line_num}: not CSV: {e}") from None
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The first task file


def init_task(path: Path, src: str | Path, columns: dict[str, str]) -> None:
    """Write a task file with the labels of the rows in `src`, unless there is a file. Prints what was done.

    columns: names of the fields "text", "label" and optionally "group".
    Error: UserError where the label column holds something else than a few labels that repeat, or where no task can be
    made of the file's name and the labels.
    """
    if path.is_file():
        print(f"{path}: exists and is kept; --init_task writes a new file only")
        return
    if not {"text", "label"} <= columns.keys():
        raise UserError("--init_task: expected --text_column and --label_column, the columns of the rows")
    answers = [row["answer"] for row in read_columns(src, columns) if row["answer"]]
    counts = Counter(answers)
    if len(counts) < 2:
        raise UserError(f"{src}: field '{columns['label']}': {list(counts)}; expected at least two different labels")
    if len(counts) > 20 and len(counts) > len(answers) / 2:
        found = f"{len(counts)} different values in {len(answers)} rows"
        raise UserError(f"{src}: field '{columns['label']}': {found}; expected labels, which repeat")
    labels = tuple(sorted(counts))
    question = f"Which of these labels fits the text best: {', '.join(labels)}?"
    template = question + " Answer with the label alone.\n\n{input}"
    fields = {"name": path.stem.removesuffix("_task"), "labels": list(labels), "template": template}
    if fields["name"] in ("", CREDITMIX):
        raise UserError(f"{path}: expected NAME_task.json with a name of your own")
    Task.parse(path, fields | {"null_inputs": ["", "N/A", "[MASK]"], "columns": columns}).save(path)
    print(f"{path}: written, labels " + ", ".join(f"{label} ({counts[label]} rows)" for label in labels))
    print('  It works as it is. Worth editing: "template" (what the text is, what each label means) and the order of')
    print('  "labels" (neighbours become the rejected answers of DPO). Then run the same command again.')


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


def default_balance(task: Task) -> str:
    """CreditMix's recipe trains on equally many rows of each class; other tasks train on all of theirs."""
    return "smallest" if task.name == CREDITMIX else "none"


def training_rows(place: str | Path, train: list[dict], task: Task, how: str, seed: int) -> list[dict]:
    """The rows of the training side that are trained on: those with a label, balanced or not (`how`, of BALANCE).

    Error: UserError beginning with `place` where they have one label only; with "smallest", where a class has no row.
    """
    labelled = [r for r in train if r["answer"]]
    if how == "smallest" and labelled:
        return balance(place, labelled, task.labels, seed)
    found = {r["answer"] for r in labelled}
    if len(found) == 1:
        raise UserError(f"{place}: all rows have the label {found.pop()!r}; expected at least two labels")
    return labelled


def row_key(row: dict) -> str:
    return f"{row['group']}:{row['question']}"


def balance(place: str | Path, rows: list[dict], labels: tuple, seed: int, n: int | None = None) -> list[dict]:
    """`n` rows of each class, by default as many as the smallest class has.

    One row of every customer comes first, then a second of each, and so on: a customer's months are near copies, so
    more customers teach more than more months. A hash of seed and row orders the rows of a customer.
    Errors: UserError beginning with `place`, naming a class with fewer than n rows, or with none.
    """
    by_class = {label: [r for r in rows if r["answer"] == label] for label in labels}
    smallest = min(labels, key=lambda label: len(by_class[label]))
    have = len(by_class[smallest])
    if have < (n or 1):
        raise UserError(f"{place}: class {smallest!r} has {have} rows; expected at least {n or 1}")
    for same in by_class.values():
        same.sort(key=lambda r: unit_hash(f"balance:{seed}", row_key(r)))
        seen, turns = Counter(), []
        for r in same:
            seen[r["group"]] += 1
            turns.append(seen[r["group"]])
        same[:] = [same[i] for i in np.argsort(turns, kind="stable")]
    return [r for label in labels for r in by_class[label][: n or have]]


def rows_per_class(held: list[dict], task: Task, per_class: int | None, seed: int) -> list[dict]:
    """per_class rows of each class, the same ones for the same seed; all rows when per_class is None.

    Errors: UserError naming a class with fewer rows.
    """
    if per_class is None:
        return held
    out = []
    for label in task.labels:
        rows = sorted((r for r in held if r["answer"] == label), key=lambda r: unit_hash(seed, r["question"]))
        if len(rows) < per_class:
            raise UserError(f"--val_per_class {per_class}: class {label!r} has only {len(rows)} held-out rows")
        out += rows[:per_class]
    return out
