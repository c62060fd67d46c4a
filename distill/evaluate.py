"""Statistics of an evaluation: cluster bootstrap, calibration error, paired tests, overlap with training rows."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from common import Task, log_loss, row_hash
from distill.files import UserError

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)

# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def bootstrap(statistic: Callable, rows: np.ndarray, groups: Sequence, draws: int = 2000, seed: int = 0):
    """Values of a statistic over resamples of whole groups (cluster bootstrap; Field and Welsh 2007).

    Rows of a group depend on each other (a customer's months, a company's receipts), so groups are drawn, not rows.

    statistic: maps sums over rows, float array [draws, ...], to its values [draws, ...]
    rows: float array [N, ...], what each row adds to the sums
    groups: N hashable names of groups
    """
    names, index = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(names), *np.shape(rows)[1:]))
    np.add.at(sums, index, rows)
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return statistic(np.tensordot(counts.astype(float), sums, axes=1))


def bootstrap_mean(values: Sequence[float], groups: Sequence) -> np.ndarray:
    """Means of `values` [N] over resamples of whole groups, float array [draws]."""
    values = np.asarray(values, float)
    return bootstrap(ratio, np.stack([values, np.ones_like(values)], axis=1), groups)


def ratio(sums: np.ndarray) -> np.ndarray:
    """Numerator over denominator, [..., 2] -> [...]; NaN where the denominator is 0."""
    top, bottom = np.moveaxis(sums, -1, 0)
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)


def interval(values: np.ndarray) -> list[float]:
    """95 % percentile interval [low, high] of bootstrap values [draws]; NaN values are left out."""
    return np.nanpercentile(values, [2.5, 97.5]).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Classification


def metrics(
    scores: np.ndarray, y: np.ndarray, groups: np.ndarray, task: Task, weights: np.ndarray | None = None
) -> dict:
    """Figures of one set of scores [N, L] against true classes y [N], with intervals over groups [N].

    weights: of the rows [N], to report another class mix than that of the rows; support and confusion are then sums
        of weights.
    Macro-F1 is the mean over the classes that have rows.
    """
    from scipy.special import softmax

    n_labels, predicted, p = len(task.labels), scores.argmax(1), softmax(scores, axis=1)
    matrix, counts = confusion(y, predicted, n_labels, weights), class_counts(y, predicted, n_labels)
    if weights is not None:
        counts = counts * weights[:, None, None]
    present = counts[:, np.bincount(y, minlength=n_labels) > 0]
    accuracy, macro_f1 = accuracy_and_macro_f1(present.sum(0)).tolist()
    drawn = bootstrap(accuracy_and_macro_f1, present, groups)
    rates = np.stack([*precision_recall_f1(counts.sum(0)), matrix.sum(1)], axis=1).tolist()
    names = ("precision", "recall", "f1", "support")
    return {
        "accuracy": accuracy,
        "accuracy_ci95": interval(drawn[:, 0]),
        "macro_f1": macro_f1,
        "macro_f1_ci95": interval(drawn[:, 1]),
        "per_class": {label: dict(zip(names, r, strict=True)) for label, r in zip(task.labels, rates, strict=True)},
        "confusion": matrix.tolist(),
        "predicted": dict(zip(task.labels, matrix.sum(0).tolist(), strict=True)),
        "takes_over": next((task.labels[i] for i in range(n_labels) if takes_over(matrix, i)), None),
        "log_loss": log_loss(scores, y, weights),
        "brier": float(np.average(((p - np.eye(n_labels)[y]) ** 2).sum(1), weights=weights)),
        "ece": ece(p, y, weights=weights),
        "coverage_at_5_percent_error": coverage_at_error(p, y, 0.05, weights),
    }


def confusion(y: np.ndarray, predicted: np.ndarray, n_labels: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Counts or sums of weights [L, L]: true class by row, predicted class by column."""
    return np.bincount(y * n_labels + predicted, weights, minlength=n_labels**2).reshape(n_labels, n_labels)


def class_counts(y: np.ndarray, predicted: np.ndarray, n_labels: int) -> np.ndarray:
    """What each row adds to the counts of each class, [N, L, 3]: hits, predictions, true cases."""
    true, said = np.eye(n_labels)[y], np.eye(n_labels)[predicted]
    return np.stack([true * said, said, true], axis=-1)


def precision_recall_f1(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts [..., 3] of hits, predictions and true cases -> precision, recall and F1, each [...]; 0 for 0/0."""
    hit, said, true = np.moveaxis(np.asarray(counts, float), -1, 0)
    pairs = ((hit, said), (hit, true), (2 * hit, said + true))
    return tuple(np.divide(a, b, out=np.zeros_like(b), where=b > 0) for a, b in pairs)


def accuracy_and_macro_f1(counts: np.ndarray) -> np.ndarray:
    """Accuracy and macro-F1, [..., 2], of class counts [..., L, 3]."""
    right = ratio(counts[..., [0, 2]].sum(-2))
    return np.stack([right, precision_recall_f1(counts)[2].mean(-1)], axis=-1)


def takes_over(matrix: np.ndarray, i: int) -> bool:
    """Whether class i is predicted for most rows, and for more than 1.5 times as many as belong to it."""
    said, true = matrix.sum(0), matrix.sum(1)
    return bool(said[i] > 1.5 * true[i] and said[i] > matrix.sum() / 2)


def ece(p: np.ndarray, y: np.ndarray, bins: int = 15, weights: np.ndarray | None = None) -> float:
    """Expected calibration error of the predicted class in bins of equal width (Guo et al. 2017).

    p [N, L], y [N], weights [N] of the rows.
    """
    gap = p.max(1) - (p.argmax(1) == y)
    where = np.minimum((p.max(1) * bins).astype(int), bins - 1)
    share = np.full(len(y), 1 / len(y)) if weights is None else weights / weights.sum()
    return float(np.abs(np.bincount(where, share * gap)).sum())


# ---------------------------------------------------------------------------------------------------------------------
# Decisions by threshold


def coverage_at_error(p: np.ndarray, y: np.ndarray, error: float, weights: np.ndarray | None = None) -> float:
    """The largest share of rows that can be decided, surest first, with at most this share of them wrong.

    p [N, L], y [N], weights [N] of the rows. Rows that are equally sure are decided together.
    """
    top, wrong = p.max(1), p.argmax(1) != y
    weights = np.ones(len(y)) if weights is None else weights
    order = np.argsort(-top, kind="stable")
    decided = np.cumsum(weights[order])
    last_of_equals = np.append(np.diff(top[order]) != 0, True)
    good = last_of_equals & (np.cumsum((weights * wrong)[order]) <= error * decided)
    return float(decided[good].max(initial=0) / decided[-1])


def act_above(p: np.ndarray, y: np.ndarray, labels: Sequence[str], weights: np.ndarray | None = None) -> list[dict]:
    """What deciding only from a probability upward gives, one entry per threshold of THRESHOLDS.

    Each holds the threshold "p"; "coverage" and "error" of deciding rows whose predicted class reaches it; and for
    each label the "share" of rows whose probability of that label reaches it, with "precision" and "recall". A figure
    over no rows is None.
    """
    weights = np.ones(len(y)) if weights is None else weights

    def share(part, of):
        return float(weights[part].sum() / weights[of].sum()) if weights[of].sum() else None

    top, right, all_rows = p.max(1), p.argmax(1) == y, np.ones(len(y), bool)
    table = []
    for t in THRESHOLDS:
        entry = {"p": t, "coverage": share(top >= t, all_rows), "error": share((top >= t) & ~right, top >= t)}
        entry["per_class"] = {}
        for i, label in enumerate(labels):
            acts, true = p[:, i] >= t, y == i
            rates = {"precision": share(acts & true, acts), "recall": share(acts & true, true)}
            entry["per_class"][label] = {"share": share(acts, all_rows), **rates}
        table.append(entry)
    return table


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> list[dict]:
    """Confidence against accuracy in bins of equal width, of answers [N]; bins without an answer are left out."""
    where = np.minimum((confidence * bins).astype(int), bins - 1)
    table = []
    for b in np.unique(where):
        own = where == b
        means = {"confidence": float(confidence[own].mean()), "accuracy": float(right[own].mean())}
        table.append({"from": b / bins, "to": (b + 1) / bins, "n": int(own.sum()), **means})
    return table


def confidence_figures(confidence: np.ndarray, right: np.ndarray) -> dict:
    """What the confidence of an answer says about its being right, for answers [N] with right a bool array.

    "threshold" is the lowest confidence among the answers of "coverage_at_5_percent_error", None where there are none.
    It was chosen on these very answers.
    """
    p, y = confidence[:, None], (~right).astype(int)  # each answer as a choice among one label, the right one if y is 0
    coverage = coverage_at_error(p, y, 0.05)
    accepted = round(coverage * len(y))
    return {
        "n": len(y),
        "accuracy": float(right.mean()),
        "mean_confidence": float(confidence.mean()),
        "ece": ece(p, y),
        "coverage_at_5_percent_error": coverage,
        "threshold": float(np.sort(confidence)[-accepted]) if accepted else None,
        "reliability": reliability(confidence, right),
        "act_above": [{k: v for k, v in e.items() if k != "per_class"} for e in act_above(p, y, ())],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Two models on the same rows


def compare(a: np.ndarray, b: np.ndarray, groups: np.ndarray) -> dict:
    """Which of two models is right on more rows: bool arrays [N] of right answers, groups [N] from 0.

    "p" is the exact McNemar test, which counts rows as independent; "permutation_p" is the exact paired sign-flip test
    over groups (Fisher): under the null hypothesis each group's difference is as likely with the other sign. "groups"
    counts those that differ. Where the rows of a group agree, McNemar's p is too small.
    """
    from scipy.stats import binomtest

    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    differences = np.bincount(groups, a.astype(int) - b.astype(int)).astype(int)
    found = {"only_a_right": only_a, "only_b_right": only_b, "p": float(p)}
    return found | {"permutation_p": sign_flip_p(differences), "groups": int((differences != 0).sum())}


def sign_flip_p(differences: np.ndarray) -> float:
    """Two-sided p of the sum of integers [G] when each sign is a fair coin: exact, by convolution over the groups."""
    sizes = np.abs(differences[differences != 0])
    most = int(sizes.sum())
    chance = np.zeros(2 * most + 1)  # of each sum from -most to most
    chance[most] = 1
    for k in sizes:
        chance = (np.roll(chance, k) + np.roll(chance, -k)) / 2
    extreme = np.abs(np.arange(-most, most + 1)) >= abs(int(differences.sum()))
    return float(min(chance[extreme].sum(), 1))


# ---------------------------------------------------------------------------------------------------------------------
# Overlap of evaluation and training


def trained_rows(name: str) -> frozenset | None:
    """Hashes of a model's training rows: none for a base model, None for an adapter without train_rows.txt."""
    path = Path(name) / "train_rows.txt"
    if path.is_file():
        return frozenset(path.read_text(encoding="utf-8").split())
    return None if (Path(name) / "adapter_config.json").is_file() else frozenset()


def check_overlap(name: str, prompts: Sequence[Sequence[str]], allowed: bool) -> int | None:
    """How many evaluation rows a model was trained on; None where that is unknown, which is said.

    prompts: for each evaluation row, the user messages under which it may have been a training row.
    Error: UserError where there are some, unless allowed.
    """
    trained = trained_rows(name)
    if trained is None:
        print(unknown_overlap(name), file=sys.stderr)
        return None
    n = sum(any(row_hash(p) in trained for p in own) for own in prompts)
    if n and not allowed:
        raise UserError(
            f"{name}: trained on {n} of the {len(prompts)} evaluation rows; expected none (the --data and --seed of "
            "its prepare script, or --allow_overlap)"
        )
    return n


def unknown_overlap(name: str) -> str:
    return f"{name}: no train_rows.txt, so its overlap with the evaluation rows is unknown"


def overlap_record(overlap: dict[str, int | None]) -> dict:
    """What a report says of {model: check_overlap}: the sum of the known, and the models whose overlap is unknown."""
    return {
        "overlap": sum(n or 0 for n in overlap.values()),
        "overlap_unknown": [str(name) for name, n in overlap.items() if n is None],
    }


def overlap_lines(record: dict) -> list[str]:
    """The same as lines below a table."""
    lines = [unknown_overlap(name) for name in record["overlap_unknown"]]
    if record["overlap"]:
        lines.append(f"WARNING: {record['overlap']} evaluation rows were trained on; these figures measure memory")
    return lines
