"""IDP training rows: the corpus with its gold, and plausible mistakes."""

import re
from difflib import SequenceMatcher

from common import row_hash
from distill.files import FilledText, StrictModel, Text, UserError, read_rows
from distill.tasks.idp_schema import compact, parse_valid, validator


class DocumentRow(StrictModel):
    document: FilledText


class CorpusRow(DocumentRow):
    gold: dict | list | None = None
    teacher: dict | list | Text | None = None
    group: Text | None = None


class ResultRow(StrictModel):
    """A row that infer_idp.py writes."""

    line: int
    output: dict | list


def read_corpus(path, schema, group_field):
    """Rows {"document", "gold", "group"} of a corpus, each gold checked against the schema.

    Errors: UserError naming the row and the gold's first fault.
    """
    rows, _ = read_answers([path], schema, group_field)
    for i, row in enumerate(rows, 1):
        if "gold" not in row:
            raise UserError(f"{path}: row {i}: field 'gold' is missing; expected the JSON that the document states")
    return rows


def read_answers(paths, schema, group_field):
    """(rows, invalid) of corpus files: {"document", "gold" or "teacher" or both, "group"}.

    "gold" was checked by people, "teacher" is a model's answer, JSON or its text. A teacher's answer that is no JSON of
    the schema is left out and counted in `invalid`. The group of a row without one is its company.
    Errors: UserError naming the row, for a gold that is not of the schema, or a row with neither answer.
    """
    judge, found, invalid = validator(schema), [], 0
    for path in paths:
        rows = read_rows(path, CorpusRow)
        for i, row in enumerate(rows, 1):
            place = f"{path}: row {i}"
            if row.get("gold") is None and row.get("teacher") is None:
                raise UserError(
                    f"{place}: field 'gold' is missing, and 'teacher' too; expected an answer in one of them"
                )
            row = {k: v for k, v in row.items() if v is not None}
            if "gold" in row and (error := next(judge.iter_errors(row["gold"]), None)):
                raise UserError(f"{place}: gold {error.json_path}: {error.message[:120]}")
            if "teacher" in row:
                value, _ = parse_valid(
                    row["teacher"] if isinstance(row["teacher"], str) else compact(row["teacher"]), judge
                )
                row["teacher"] = value
                if value is None:
                    invalid += 1
                    del row["teacher"]
                    if "gold" not in row:
                        continue
            if not row.get("group"):
                answer = row.get("gold", row.get("teacher"))
                owner = answer.get(group_field) if isinstance(answer, dict) else None
                # one spelling per company; a document without one is a group by itself
                row["group"] = re.sub(r"\W+", "", str(owner)).upper() if owner else row_hash(row["document"])
            found.append(row)
    return found, invalid


LEGAL_FORMS = r"\b(SDN|BHD|S/B|LTD|INC|CO|COMPANY|ENTERPRISE|TRADING|PLT|LLC|CORP|GMBH|SARL|LDA|UNIPESSOAL|SA)\b"


def company_key(name):
    """Letters and digits of a company's name in upper case, without its legal form."""
    return re.sub(r"[\W_]+", "", re.sub(LEGAL_FORMS, " ", str(name).upper()))


def without_held_out(rows, held, group_field):
    """(kept, dropped): the teacher's rows that could tell a model about held-out documents are dropped.

    The rule: a row is dropped when (1) its company's key (`company_key`) equals that of a held-out document, or is
    similar to it (difflib ratio of at least 0.85), (2) the key of a held-out company, of six letters or more, occurs in
    its document, or (3) more than half of its document's five-word sequences occur in one held-out document.
    """
    keys = {company_key((r["gold"] or {}).get(group_field) or "") for r in held} - {""}
    texts = [five_grams(r["document"]) for r in held]
    kept = []
    for row in rows:
        own, text = company_key(row["teacher"].get(group_field) or ""), re.sub(r"[\W_]+", "", row["document"].upper())
        grams = five_grams(row["document"])
        similar = own and any(SequenceMatcher(None, own, key).ratio() >= 0.85 for key in keys)
        named = any(len(key) >= 6 and key in text for key in keys)
        same = any(len(grams & other) > len(grams) / 2 for other in texts)
        if not (similar or named or same):
            kept.append(row)
    return kept, len(rows) - len(kept)


def five_grams(text):
    words = re.findall(r"\w+", text.upper())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


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
