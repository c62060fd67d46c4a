"""When two values count as equal, field counts, and the regular expressions that a model has to beat."""

import json
import re
import unicodedata
from collections import Counter
from datetime import date

from distill.tasks.idp_leaves import leaves_of
from distill.tasks.idp_schema import compact

SROIE_FIELDS = {"company", "date", "address", "total"}
MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
DATE = r"(\d{4})[-/.](\d\d?)[-/.](\d\d?)|(\d\d?)[-/. ]?(\d\d?|[a-z]{3})[-/. ,]*(\d{4}|\d\d)"


def as_date(text):
    """The ISO date that a text states and nothing else, day before month; None where it is no date."""
    m = re.fullmatch(DATE, text.strip().lower())
    if not m or (text.strip().isdecimal() and len(text.strip()) not in (6, 8)):
        return None
    year, month, day = m.group(1, 2, 3) if m[1] else m.group(6, 5, 4)
    month = MONTHS.index(month) + 1 if month in MONTHS else month
    try:
        return date(int(year) + 2000 * (len(year) == 2), int(month), int(day)).isoformat()
    except ValueError:
        return None


def canonical(value):
    """What two values must share to count as equal: an amount or a date by value, else letters and digits, lower case.

    "RM 1,234.50" and 1234.5 are equal, as are "80" and "80.00", "25/12/2018" and "2018-12-25", "No.2, JALAN 3" and "no
    2 jalan 3". A date without separators has 6 or 8 digits; other bare digits are a number unless they begin with 0.
    None where nothing is stated: null, an empty text, only punctuation.
    """
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (int, float)):  # a weak model may write an integer that no float holds
        return ("number", round(float(value), 2) if abs(value) < 1e15 else value)
    amount = re.fullmatch(r"\s*\D{0,4}?\s*(-?\d[\d,]*\.\d\d?)\s*\D{0,4}", value)
    if amount:
        return ("number", round(float(amount[1].replace(",", "")), 2))
    if as_date(value):
        return ("date", as_date(value))
    if re.fullmatch(r"\s*-?[1-9]\d{0,14}\s*", value):
        return ("number", float(value))
    text = "".join(c for c in unicodedata.normalize("NFKC", value).casefold() if c.isalnum())
    return ("text", text) if text else None


def leaves(value, path=""):
    """(path, value) of every scalar inside a JSON value; list positions are not part of the path."""
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in leaves(v, f"{path}.{k}" if path else k)]
    if isinstance(value, list):
        return [leaf for v in value for leaf in leaves(v, path + "[]")]
    return [(path, value)]


def field_counts(predicted, gold):
    """{path: [right, predicted, in the gold]} of one document; null counts as not stated."""
    have, want = (
        Counter((p, canonical(v)) for p, v in leaves(x) if canonical(v) is not None) for x in (predicted, gold)
    )
    counts = {}
    for index, counter in enumerate((have & want, have, want)):
        for (path, _), n in counter.items():
            counts.setdefault(path, [0, 0, 0])[index] += n
    return counts


def right_leaves(found, gold):
    """Whether each of a result's leaves (of idp_leaves.leaves_of) is one of the gold's in its field: list of bool.

    Each leaf of the gold counts once. A null is right where the gold has one, an empty list where the gold's is empty.
    """

    def key(leaf):
        empty = isinstance(leaf.value, list | dict)
        return leaf.field, compact(leaf.value) if empty else canonical(leaf.value)

    left, right = Counter(map(key, leaves_of(gold))), []
    for leaf in found:
        right.append(left[key(leaf)] > 0)
        left[key(leaf)] -= right[-1]
    return right


def edit_similarity(a, b):
    """1 - Levenshtein distance / length of the longer: 1 for equal texts, 0 where every character differs."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return 1 - row[-1] / max(len(a), len(b), 1)


def regex_receipt(document):
    """The SROIE fields by regular expressions and position: what a model has to beat."""
    lines = [line.strip() for line in document.splitlines() if line.strip()]
    legal = r"\b(SDN|BHD|S/B|ENTERPRISE|TRADING|RESTAURANT|RESTORAN|LTD|COMPANY|MART|SHOP)\b"
    company = next((i for i, line in enumerate(lines[:6]) if re.search(legal, line)), 0)
    rest = lines[company + 1 :]
    stop = r"TEL|FAX|GST|INVOICE|RECEIPT|CASH|DATE|PHONE|\bBILL\b|" + r"\d\d[/-]\d\d[/-]\d\d"
    end = next((i for i, line in enumerate(rest) if i and re.search(stop, line)), min(3, len(rest)))
    address = [line for line in rest[:end] if not re.search(r"^\(?[\dA-Z]{6,}-?[A-Z]?\)?$|" + stop, line)]
    day = re.search(r"\b\d{4}[-/.]\d\d[-/.]\d\d\b|\b\d\d?([-/. ])(\d\d?|[A-Za-z]{3})\1(\d{4}|\d\d)\b", document)
    amount, total = r"(\d[\d,]*\.\d\d)\b", None
    for i, line in enumerate(lines):  # the last line of a total, or the amount on the next line
        if re.search(r"TOTAL", line) and not re.search(r"SUB|QTY|ITEM|GST \d|TAX\b|SAVING|DISC", line):
            found = re.findall(amount, line) or re.findall(amount, lines[i + 1] if i + 1 < len(lines) else "")[:1]
            total = found[-1] if found and float(found[-1].replace(",", "")) else total
    return {
        "company": lines[company],
        "date": day[0] if day else None,
        "address": " ".join(address) or None,
        "total": total,
    }


def free_value(text):
    """The JSON in an unconstrained answer: from its first brace to its last."""
    m = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        return json.loads(m[0]) if m else None
    except (ValueError, RecursionError):
        return None
