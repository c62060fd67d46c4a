"""IDP training rows: the corpus with its gold, copies with exchanged values, plausible mistakes."""

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


def exchanged(row, pool, rng):
    """The row with about half of the values that its document shows letter for letter taken from other documents.

    From few documents a model learns where each template puts a value; with values that come and go it has to learn
    what a value looks like. A document's other places that show the same value change with it; an exchange that would
    take away another field's value is not made.
    pool: {field: values to draw from}, as shown_values gives it.
    """
    for key in pool:
        if shows(row, key) and rng.random() < 0.5:
            value, gold = rng.choice(pool[key]), row["gold"]
            document = standing_alone(gold[key]).sub(lambda _, value=value: value, row["document"])
            other = {**row, "document": document, "gold": {**gold, key: value}}
            row = other if all(shows(other, k) for k in gold if shows(row, k)) else row
    return row


def shown_values(rows):
    """{field: the values of the rows whose documents show them}."""
    pool = {}
    for row in rows:
        for key in row["gold"]:  # of a list shows() takes none
            if shows(row, key):
                pool.setdefault(key, []).append(row["gold"][key])
    return pool


def shows(row, key):
    """Whether the document shows this value of the gold as it stands; a few letters could be there by chance."""
    value = row["gold"].get(key) if isinstance(row["gold"], dict) else None
    return isinstance(value, str) and len(value) > 3 and bool(standing_alone(value).search(row["document"]))


def standing_alone(value):
    """A pattern of the value where it is no part of a longer word, number or date (RM12.50 shows 12.50)."""
    before = r"(?<![\d.,/-])" if value[0].isdigit() else r"(?<!\w)"
    behind = r"(?!\d|[.,/-]\d)" if value[-1].isdigit() else r"(?!\w)"
    return re.compile(before + re.escape(value) + behind)


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
