"""IDP training rows: the corpus with its gold, and plausible mistakes."""

import re

from common import row_hash
from distill.files import UserError, read_rows
from distill.tasks.idp_schema import validator


def read_corpus(path, schema, group_field):
    """Corpus rows, each with its gold checked against the schema and its group.

    Errors: UserError naming the row and the gold's first fault.
    """
    judge = validator(schema)
    rows = read_rows(path, {"document": str, "gold": (dict, list)}, {"group": str})
    for i, row in enumerate(rows, 1):
        error = next(judge.iter_errors(row["gold"]), None)
        if error:
            raise UserError(f"{path}: row {i}: gold {error.json_path}: {error.message[:120]}")
        if not row.get("group"):
            owner = row["gold"].get(group_field) if isinstance(row["gold"], dict) else None
            # one spelling of a company; a document without one is its own group
            row["group"] = re.sub(r"\W+", "", str(owner)).upper() if owner else row_hash(row["document"])
    return rows


def mistakes(gold, document):
    """Plausible wrong answers, as (name, value): what a reader of the document gets wrong, each in one place."""
    if not isinstance(gold, dict):
        return []
    numeric = [k for k, v in gold.items() if re.fullmatch(r"-?\d+[.,]\d+|-?\d+", str(v))]
    out = [("swapped numbers", {**gold, a: gold[b], b: gold[a]}) for a in numeric for b in numeric if a < b]
    for key, value in gold.items():
        if key in numeric and key.lower() == "total":
            others = re.findall(r"\d+\.\d\d\b", document)
            out += [("other number", {**gold, key: type(value)(x)}) for x in others]
        if isinstance(value, list) and value:
            out += [("missing item", {**gold, key: value[:i] + value[i + 1 :]}) for i in range(len(value))]
        if isinstance(value, str) and (parts := re.fullmatch(r"(\d{4})-(\d\d)-(\d\d)", value)):
            out.append(("swapped day and month", {**gold, key: f"{parts[1]}-{parts[3]}-{parts[2]}"}))
        if isinstance(value, str) and (parts := re.fullmatch(r"(\d\d)([/.-])(\d\d)[/.-](\d{2,4})", value)):
            out.append(("date format", {**gold, key: f"{parts[4]}{parts[2]}{parts[3]}{parts[2]}{parts[1]}"}))
        if isinstance(value, str) and len(value.split()) > 2:
            out.append(("text cut short", {**gold, key: " ".join(value.split()[:-1])}))
        if value is not None and not isinstance(value, list):
            out.append(("missing value", {**gold, key: None}))
    return out


def rejected_answer(row, judge, rng):
    """(name, value) of a mistake that is valid JSON of the schema and not the gold; None where there is none."""
    by_name = {}
    for name, value in mistakes(row["gold"], row["document"]):
        if value != row["gold"] and judge.is_valid(value):
            by_name.setdefault(name, []).append(value)
    if not by_name:
        return None
    name = rng.choice(sorted(by_name))
    return name, rng.choice(by_name[name])
