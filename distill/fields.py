"""The features text that models read: fields written as text, and read back from it."""

import re

import pandas as pd

from distill.files import UserError

SIX = ["Age", "Occupation", "Annual Income", "Outstanding Debt", "Credit Utilization Ratio", "Payment Behaviour"]


def features_text(d, fields):
    """The text that models read, for each row of a frame: age with one decimal, the six fields' numbers with two."""

    def shown(name, value):
        if isinstance(value, str):
            return value
        text = f"{value:.1f}" if name == "Age" else f"{value:.2f}"
        return text if name in SIX else "N/A" if pd.isna(value) else text.removesuffix(".00")

    return [", ".join(f"{n}: {shown(n, v)}" for n, v in zip(fields, row, strict=True)) for row in d[fields].values]


def split_fields(text):
    """[(name, value), ...] of a text 'Key: value, Key: value', all as written; empty for another text."""
    return re.findall(r"(?:^|, )([^:,]+): (.*?)(?=, [^:,]+: |$)", text)


def parse_fields(text):
    """{"Age": 23.0, "Occupation": "Scientist", ...} of a features text: numbers as floats, N/A as NaN.

    Errors: UserError when the text has no 'Key: value' fields.
    """
    fields = {}
    for key, value in split_fields(text):
        try:
            fields[key] = float("nan") if value == "N/A" else float(value)
        except ValueError:
            fields[key] = value
    if not fields:
        raise UserError(f"gradient boosting needs texts like 'Key: value, Key: value', got {text[:60]!r}")
    return fields


def customer(text):
    """Who a row without a group belongs to: same income and debt, same customer; another task's text is its own."""
    found = re.search(r"Annual Income: ([^,]+).*Outstanding Debt: ([^,]+)", text)
    return f"income {found[1]}, debt {found[2]}" if found else text
