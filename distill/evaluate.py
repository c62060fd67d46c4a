"""What an evaluation of a label task says of scores: counts, intervals, calibration, a test between two models."""

import functools
import sys
from pathlib import Path

import numpy as np

from common import log_loss, row_hash
from distill.files import UserError


def metrics(scores, y, groups, task):
    """Everything the report says of one set of scores [N, L] against true classes y [N]; groups [N] are customers."""
    from scipy.special import softmax

    n_labels, predicted, p = len(task.labels), scores.argmax(1), softmax(scores, axis=1)
    matrix = confusion(y, predicted, n_labels)
    accuracy, f1, per_class = from_confusion(matrix)
    accuracies, f1s = bootstrap(y, predicted, groups, n_labels)
    return {
        "accuracy": accuracy,
        "accuracy_ci95": np.percentile(accuracies, [2.5, 97.5]).tolist(),
        "macro_f1": f1,
        "macro_f1_ci95": np.percentile(f1s, [2.5, 97.5]).tolist(),
        "per_class": dict(zip(task.labels, per_class, strict=True)),
        "confusion": matrix.tolist(),
        "predicted": dict(zip(task.labels, matrix.sum(0).tolist(), strict=True)),
        "takes_over": next((task.labels[i] for i in range(n_labels) if takes_over(matrix, i)), None),
        "log_loss": log_loss(scores, y),
        "brier": float(((p - np.eye(n_labels)[y]) ** 2).sum(1).mean()),
        "ece": ece(p, y),
    }


def confusion(y, predicted, n_labels):
    """Counts [L, L]: true class by row, predicted by column."""
    return np.bincount(y * n_labels + predicted, minlength=n_labels**2).reshape(n_labels, n_labels)


def from_confusion(matrix):
    """(accuracy, macro-F1, per class {precision, recall, f1, support}); a ratio without cases is 0."""
    hit, true, said = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    precision, recall = hit / np.maximum(said, 1), hit / np.maximum(true, 1)
    f1 = 2 * hit / np.maximum(true + said, 1)
    names = ("precision", "recall", "f1", "support")
    per_class = [dict(zip(names, map(float, v), strict=True)) for v in zip(precision, recall, f1, true, strict=True)]
    return float(hit.sum() / max(matrix.sum(), 1)), float(f1.mean()), per_class


def bootstrap(y, predicted, groups, n_labels, times=1000):
    """Accuracies and macro-F1s [times] of as many customers drawn with replacement (cluster bootstrap)."""
    cells = np.zeros((groups.max() + 1, n_labels**2))
    np.add.at(cells, (groups, y * n_labels + predicted), 1)
    rng = np.random.default_rng(0)
    draws = rng.multinomial(len(cells), np.full(len(cells), 1 / len(cells)), size=times) @ cells
    found = [from_confusion(d.reshape(n_labels, n_labels))[:2] for d in draws]
    return np.array(found).T


def takes_over(matrix, i):
    """Whether class i is predicted for more than half as many rows again as belong to it, and for most rows."""
    said, true = matrix.sum(0), matrix.sum(1)
    return bool(said[i] > 1.5 * true[i] and said[i] > matrix.sum() / 2)


def ece(p, y, bins=15):
    """Expected calibration error of the predicted class's probability in equal bins (Guo et al. 2017)."""
    top, right = p.max(1), p.argmax(1) == y
    where = np.minimum((top * bins).astype(int), bins - 1)
    gaps = [abs(right[where == b].mean() - top[where == b].mean()) * (where == b).mean() for b in np.unique(where)]
    return float(sum(gaps))


def mcnemar(a, b):
    """Exact McNemar test of two models' right answers [N] on the same rows: the discordant counts and p."""
    from scipy.stats import binomtest

    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return {"only_a_right": only_a, "only_b_right": only_b, "p": float(p)}


@functools.cache
def trained_rows(name):
    """Hashes of the rows that an adapter was trained on; empty for a model that does not say."""
    path = Path(name) / "train_rows.txt"
    return frozenset(path.read_text(encoding="utf-8").split()) if path.is_file() else frozenset()


def check_overlap(name, held, task, allow):
    """How many held-out rows the model was trained on; UserError when there are some, unless allowed."""
    seen = trained_rows(name)
    if not seen and (Path(name) / "adapter_config.json").is_file():
        print(f"{name}: no train_rows.txt, so overlap with its training rows is unknown", file=sys.stderr)
    n = sum(row_hash(task.prompt(r["question"])) in seen for r in held)
    if n and not allow:
        raise UserError(
            f"{name}: trained on {n} of the {len(held)} evaluation rows; expected none (same --data and --seed as "
            "creditmix_prepare.py, or --allow_overlap)"
        )
    return n
