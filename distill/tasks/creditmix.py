"""CreditMix rows: the features text, and the public CSV with its dirt."""

import gzip
import re
import zlib
from collections import Counter
from pathlib import Path

import pandas as pd

from distill.files import UserError, check_file

NAME = "creditmix"  # of the task
SIX = ["Age", "Occupation", "Annual Income", "Outstanding Debt", "Credit Utilization Ratio", "Payment Behaviour"]


def features_text(d: pd.DataFrame, fields: list[str]) -> list[str]:
    """The text that models read, one per row: age with one decimal, the other numbers of the six fields with two."""

    def shown(name, value):
        if isinstance(value, str):
            return value
        text = f"{value:.1f}" if name == "Age" else f"{value:.2f}"
        return text if name in SIX else "N/A" if pd.isna(value) else text.removesuffix(".00")

    return [", ".join(f"{n}: {shown(n, v)}" for n, v in zip(fields, row, strict=True)) for row in d[fields].values]


def split_fields(text: str) -> list[tuple[str, str]]:
    """[(name, value), ...] of a text 'Key: value, Key: value', as written; empty for any other text."""
    return re.findall(r"(?:^|, )([^:,]+): (.*?)(?=, [^:,]+: |$)", text)


def parse_fields(text: str) -> dict[str, float | str]:
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


def customer(text: str) -> str:
    """The group of a row without one: rows of equal income and debt are one customer; any other text is its own."""
    found = re.search(r"Annual Income: ([^,]+).*Outstanding Debt: ([^,]+)", text)
    return f"income {found[1]}, debt {found[2]}" if found else text


CONSTANT = ["Credit Mix", "Age", "Occupation", "Annual Income", "Outstanding Debt"]  # over a customer's months
MISSING = ["", "_", "_______", "!@9#%8", "NM"]
# What a genuine number can be: wider than the public data's clean values, narrower than their dirt.
PLAUSIBLE = {
    "Age": (14, 100),
    "Annual Income": (1_000, 200_000),
    "Outstanding Debt": (0, 10_000),
    "Credit Utilization Ratio": (0, 100),
}
EXTRA = {
    "Monthly Inhand Salary": (0, 20_000),
    "Num Bank Accounts": (0, 20),
    "Num Credit Card": (0, 20),
    "Interest Rate": (1, 50),
    "Num of Loan": (0, 20),
    "Delay from due date": (-10, 100),
    "Num of Delayed Payment": (0, 50),
    "Changed Credit Limit": (-10, 50),
    "Num Credit Inquiries": (0, 50),
    "Credit History Months": (0, 1_000),
    "Total EMI per month": (0, 5_000),
    "Amount invested monthly": (0, 5_000),
    "Monthly Balance": (0, 5_000),
}


def read_csv(path: str | Path, columns: str = "six") -> tuple[list[dict], Counter]:
    """The public CSV as downloaded (.csv, .csv.gz) -> its usable rows, and a Counter of the dropped ones.

    Rows are {"question": features text, "answer": label, "group": customer}.
    columns: "six" fields in the text, or "all" the informative ones.
    Where the file has a column NAME_clean, as some copies of the data do, it stands for NAME. What is constant for a
    customer is repaired where it is missing, impossible or far from the customer's usual value; a row that still
    lacks its label or one of the six fields is dropped.
    """
    fields = SIX if columns == "six" else [*SIX, *EXTRA, "Payment of Min Amount"]
    data = read_table(path, ["Customer ID", "Credit Mix", *fields])
    who = data["Customer ID"]
    for name, (low, high) in (PLAUSIBLE | EXTRA).items():
        if name in fields:
            number = pd.to_numeric(data[name].str.strip("_ "), errors="coerce")
            data[name] = number.where(number.between(low, high))
    for name in CONSTANT:
        own, normal = data[name], usual(data[name], who)
        if name == "Age":  # a birthday is no dirt
            own = own.where((own - normal).abs() <= 1)
        elif name == "Annual Income":
            own = own.where((own / normal).between(0.5, 2))
        data[name] = own.fillna(normal)
    for name in EXTRA.keys() & set(fields):
        data[name] = data[name].fillna(data[name].groupby(who).transform("median"))

    reason = pd.Series("", index=data.index)
    for name in ("Customer ID", "Credit Mix", *SIX):
        why = f"no {name} in any month of the customer" if name in CONSTANT else f"no {name}"
        reason = reason.where((reason != "") | data[name].notna(), why)
    dropped, data = Counter(reason[reason != ""]), data[reason == ""]
    if data.empty:
        raise UserError(f"{path}: no usable row; dropped: {dict(dropped)}")
    rows = zip(features_text(data, fields), data["Credit Mix"], data["Customer ID"], strict=True)
    return [{"question": q, "answer": a, "group": g} for q, a, g in rows], dropped


def read_table(path: str | Path, fields: list[str]) -> pd.DataFrame:
    """Columns of a CSV as text, underscores in their names read as blanks; NaN where the public data marks a gap."""
    check_file(path)
    try:
        raw = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{path}: not a CSV file: {' '.join(str(e).split())}") from None
    if raw.empty:
        raise UserError(f"{path}: no rows")
    raw.columns = raw.columns.str.replace("_", " ")
    if "Credit History Age" in raw:
        age = raw["Credit History Age"].str.extract(r"(\d+) Years? and (\d+) Months?").astype(float)
        raw["Credit History Months"] = (age[0] * 12 + age[1]).astype(str)
    for name in fields:
        if f"{name} clean" in raw:
            raw[name] = raw[f"{name} clean"]
        if name not in raw:
            hint = (
                "the public data's columns (rows of your own: --text_column, --label_column, --task FILE --init_task)"
            )
            raise UserError(f"{path}:1: column '{name.replace(' ', '_')}' is missing; expected {hint}")
    for line, label in enumerate(raw["Credit Mix"], 2):
        if label not in ("Good", "Standard", "Bad", *MISSING):
            raise UserError(f"{path}:{line}: column 'Credit_Mix': expected Good, Standard, Bad or _, got {label!r}")
    return raw[fields].where(~raw[fields].isin(MISSING))


def usual(values: pd.Series, who: pd.Series) -> pd.Series:
    """The most frequent value of each row's customer, NaN where there is none; the smallest of ties (dirt inflates)."""
    counts = pd.DataFrame({"who": who, "value": values}).value_counts().reset_index()
    counts = counts.sort_values(["count", "value"], ascending=[False, True]).drop_duplicates("who")
    return who.map(counts.set_index("who")["value"])
