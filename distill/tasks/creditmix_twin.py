"""The synthetic twin of the public credit-score data: a Gaussian copula in each class and band of debt.

`creditmix_prepare.py --profile` writes aggregate figures of the real rows, `--synthesize` draws rows from them.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm

from common import Task
from distill.files import ROOT, UserError, atomic_write, read_json, write_json
from distill.tasks.creditmix import PLAUSIBLE, SIX, features_text, parse_fields
from distill.tasks.label_rows import read_label_rows

PROFILE = ROOT / "data" / "creditmix_profile.json"
NUMBERS = ["Age", "Annual Income", "Outstanding Debt", "Credit Utilization Ratio"]
BANDS, SLICES = 5, 20
GRID = np.array([0, *(np.arange(SLICES) + 0.5) / SLICES, 1])  # ranks: the middle of each slice, and both ends
FEWEST = 10  # customers per figure of the profile
NOTE = (
    f"Aggregate figures of the public credit-score data, each over at least {FEWEST} customers and rounded: shares, "
    "correlations, and means of slices by rank. There is no minimum, maximum or quantile: each would be one customer's "
    "value. creditmix_dataset.json is drawn from them: it is synthetic and holds no real row."
)


def write_profile(src: str | Path, outdir: str | Path, task: Task) -> None:
    """Write creditmix_profile.json of the rows in `src`: everything that synthesize draws from.

    Error: UserError where a figure would rest on fewer than FEWEST customers.
    """
    rows = [r for r in read_label_rows(src, task)[0] if r["answer"]]
    d = pd.DataFrame([{**parse_fields(r["question"]), "label": r["answer"], "group": r["group"]} for r in rows])
    classes = {}
    for label, own in d.groupby("label"):
        customers = own.groupby("group")
        people, months = customers.first(), customers.size()
        bands = own.groupby(own["group"].map(pd.qcut(people["Outstanding Debt"], BANDS, labels=False)))
        income = slice_means(people.reset_index(), "Annual Income")
        edges = [(income[i - 1] + income[i]) / 2 for i in range(4, SLICES, 4)]  # between fifths of the customers
        spending = own.groupby(np.searchsorted(edges, own["Annual Income"]))
        classes[label] = {
            "customers": len(people),
            "rows": len(own),
            "months": shares(months.reset_index(name="months"), "months"),
            "birthday": round(float((customers["Age"].nunique()[months > 1] > 1).mean()), 3),
            "occupation": shares(people.reset_index(), "Occupation"),
            "income_edges": rounded(edges),
            "payment_behaviour": [shares(part, "Payment Behaviour") for _, part in spending],
            "slice_means": [{n: rounded(slice_means(band, n)) for n in NUMBERS} for _, band in bands],
            "rank_correlation": [band[NUMBERS].corr("spearman").values.round(2).tolist() for _, band in bands],
        }
    write_json(Path(outdir) / PROFILE.name, {"note": NOTE, "classes": classes})
    print(f"wrote {Path(outdir) / PROFILE.name}: {len(rows)} rows, {d['group'].nunique()} customers")


def shares(d: pd.DataFrame, column: str) -> dict[str, float]:
    """{value: share} of a column. Error: UserError for a value of fewer than FEWEST customers."""
    for value, customers in d.groupby(column)["group"].nunique().items():
        expect_many(customers, f"{column} {value}")
    return {str(k): round(v, 4) for k, v in d[column].value_counts(normalize=True).sort_index().items()}


def slice_means(d: pd.DataFrame, column: str) -> list[float]:
    """Means of SLICES slices of a column, cut by rank. Error: UserError for a slice of fewer than FEWEST customers."""
    parts = np.array_split(np.argsort(d[column].to_numpy(), kind="stable"), SLICES)
    for part in parts:
        expect_many(d["group"].iloc[part].nunique(), f"a slice of {column}")
    return [float(d[column].iloc[part].mean()) for part in parts]


def expect_many(customers: int, what: str) -> None:
    if customers < FEWEST:
        raise UserError(f"--profile: {what} covers {customers} customers; expected at least {FEWEST}")


def rounded(values: list[float]) -> list[float]:
    """To three significant digits."""
    return [float(f"{v:.3g}") for v in values]


def synthesize(customers: int, seed: int, outdir: str | Path) -> None:
    """Write creditmix_dataset.json: the months of synthetic customers drawn from the shipped profile."""
    if customers < 1:
        raise UserError(f"--synthesize {customers}: expected at least 1 customer")
    classes = read_json(PROFILE)["classes"]
    rng = np.random.default_rng(seed)
    label = draw_words(rng, [{k: c["customers"] for k, c in classes.items()}], np.zeros(customers, int))
    group = np.array([f"c{i:05d}" for i in range(1, customers + 1)])
    parts = [synthetic_months(group[label == k], k, c, rng) for k, c in classes.items() if k in label]
    d = pd.concat(parts).sort_values("group", kind="stable")
    rows = zip(features_text(d, SIX), d["answer"], d["group"], strict=True)
    lines = [json.dumps({"question": q, "answer": a, "group": g}, separators=(",", ":")) for q, a, g in rows]
    path = Path(outdir) / "creditmix_dataset.json"
    with atomic_write(path) as f:
        f.write("[\n" + ",\n".join(lines) + "\n]\n")
    print(f"wrote {path}: {len(lines)} synthetic rows of {customers} customers")


def synthetic_months(group: np.ndarray, label: str, c: dict, rng: np.random.Generator) -> pd.DataFrame:
    """The months of the customers `group` of one class, drawn from that class's part `c` of the profile.

    Occupation, income and debt are constant over a customer's months, as in the public data, and the age may rise once.
    Utilisation and payment behaviour are drawn anew each month, given the income: no other memory was measured.
    """
    one = np.zeros(len(group), int)
    months = draw_words(rng, [c["months"]], one).astype(int)
    who = np.repeat(np.arange(len(group)), months)
    band = np.arange(len(group)) % BANDS
    # a Gaussian copula, from Spearman's rho to its correlation; the last variable, utilisation, is the month's
    factor = np.linalg.cholesky(2 * np.sin(np.pi / 6 * np.array(c["rank_correlation"])))
    z = np.hstack([rng.standard_normal((len(group), 3))[who], rng.standard_normal((len(who), 1))])
    u = norm.cdf(np.einsum("nij,nj->ni", factor[band[who]], z))
    d = pd.DataFrame({"group": group[who], "answer": label, "Occupation": draw_words(rng, [c["occupation"]], one)[who]})
    for i, name in enumerate(NUMBERS):
        curves = [with_tails(means[name]) for means in c["slice_means"]]
        drawn = np.array([np.interp(u[j, i], GRID, curves[band[w]]) for j, w in enumerate(who)])
        d[name] = drawn.clip(*PLAUSIBLE[name])
    turn = np.where(rng.random(len(group)) < c["birthday"], rng.integers(1, np.maximum(months, 2)), months.max())
    d["Age"] = d["Age"].round() + (d.groupby("group").cumcount() >= turn[who])
    income_band = np.searchsorted(c["income_edges"], d["Annual Income"])
    d["Payment Behaviour"] = draw_words(rng, c["payment_behaviour"], income_band)
    return d


def with_tails(means: list[float]) -> list[float]:
    """Values at GRID: the means at the middle of their slices, and a straight line on to both ends."""
    return [1.5 * means[0] - 0.5 * means[1], *means, 1.5 * means[-1] - 0.5 * means[-2]]


def draw_words(rng: np.random.Generator, tables: list[dict], which: np.ndarray) -> np.ndarray:
    """One word for each entry of `which` [N], the index of the table {word: share} that it is drawn from."""
    share = pd.DataFrame(tables).fillna(0)
    below = (share.cumsum(axis=1).div(share.sum(axis=1), axis=0)).to_numpy()[which, :-1]
    return share.columns.to_numpy(dtype=object)[(rng.random((len(which), 1)) > below).sum(1)]
