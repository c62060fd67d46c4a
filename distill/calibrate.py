"""Choose a model's calibration on development rows, and save it beside the adapter."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from common import Calibration, Task, log_loss, shares_of, unit_hash
from distill.files import UserError, read_json

FOLDS = 5


def fit_calibration(
    raw: np.ndarray, prior: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None, ridge: float = 0.02
) -> Calibration:
    """Calibration of least log-loss on development rows: raw [N, L], prior [L], true classes y [N], weights [N].

    w is 0 or 1: the prior is either a bias to subtract (the base model) or none (most trained ones). The ridge keeps
    b, which could imitate any w, near 0 unless the rows speak for it. Convex in (b / T, 1 / T).
    Error: UserError without rows.
    """
    from scipy.optimize import minimize
    from scipy.special import softmax

    if not len(y):
        raise UserError("calibration: no development rows to fit on")
    share = np.full(len(y), 1 / len(y)) if weights is None else weights / weights.sum()
    true, best = np.eye(raw.shape[1])[y], None
    for w in (0.0, 1.0):
        shifted = raw - w * prior

        def loss(x, shifted=shifted):
            scores = shifted * x[0] + x[1:]
            slope = share[:, None] * (softmax(scores, axis=1) - true)
            gradient = np.r_[(slope * shifted).sum(), slope.sum(0) + 2 * ridge * x[1:]]
            return log_loss(scores, y, weights) + ridge * (x[1:] ** 2).sum(), gradient

        start = np.r_[1.0, np.zeros(raw.shape[1])]
        fit = minimize(loss, start, jac=True, bounds=[(1e-3, 1e3)] + [(None, None)] * raw.shape[1])
        if best is None or fit.fun < best[0]:
            b = fit.x[1:] - fit.x[1:].mean()
            best = fit.fun, Calibration(w, tuple(float(v) for v in b / fit.x[0]), float(1 / fit.x[0]), True)
    return best[1]


def choose_calibration(
    raw: np.ndarray, prior: np.ndarray, y: np.ndarray, groups: Sequence, weights: np.ndarray | None = None
) -> tuple[Calibration, dict]:
    """The best of raw, null and fitted scores by log-loss on development rows, and the figures of the choice.

    The fit is scored on groups (customers) that it was not made on, in FOLDS folds; raw and null scores have nothing
    to fit. It is kept only where it wins. Shapes as in `fit_calibration`; groups [N] are hashable names.
    """
    names = sorted(set(groups), key=lambda g: unit_hash("calibration", g))
    fold_of = {g: i % FOLDS for i, g in enumerate(names)}
    fold = np.array([fold_of[g] for g in groups], dtype=int)
    unseen = np.full(raw.shape, np.nan)
    for k in set(fold_of.values()) if len(names) > 1 else ():
        rest, own = fold != k, fold == k
        fit = fit_calibration(raw[rest], prior, y[rest], None if weights is None else weights[rest])
        unseen[own] = fit(raw[own], prior)
    fit, zero = fit_calibration(raw, prior, y, weights), (0.0,) * raw.shape[1]
    choices = {"raw": Calibration(0.0, zero, 1.0, True), "null": Calibration(1.0, zero, 1.0, True), "fitted": fit}
    losses = {name: log_loss(c(raw, prior), y, weights) for name, c in choices.items()}
    crossed = {**losses, "fitted": log_loss(unseen, y, weights)}
    if len(names) == 1:
        del crossed["fitted"]  # nothing to score it on
    order = sorted(crossed, key=crossed.get)
    figures = ", ".join(f"{name} {crossed[name]:.4f}" for name in order)
    reason = f"least log-loss, cross-validated over {len(names)} groups: {figures}"
    record = {"chosen": order[0], "reason": reason, "dev_rows": len(y), "dev_log_loss": losses}
    return choices[order[0]], record | {"dev_log_loss_cv": crossed}


def fit_and_save(
    folder: Path,
    task: Task,
    raw: np.ndarray,
    prior: np.ndarray,
    y: np.ndarray,
    groups: Sequence,
    class_shares: Sequence[float],
    natural_shares: Sequence[float] = (),
    label_bias: np.ndarray | None = None,
) -> tuple[Calibration, dict]:
    """Choose a calibration (`choose_calibration`) and write it to folder/calibration.json -> it and its record.

    class_shares: class mix [L] of the training rows, in the task's order. Development rows are weighted to it, so that
        it is what the calibration answers for.
    natural_shares: class mix [L] before balancing, where it is known.
    label_bias: what the operator adds to the scores [L]; it becomes part of b.
    """
    fit, record = choose_calibration(raw, prior, y, groups, class_weights(y, class_shares))
    if label_bias is not None and label_bias.any():
        record["label_bias"] = dict(zip(task.labels, label_bias.tolist(), strict=True))
        fit = with_bias(fit, label_bias)
    fit = replace(fit, class_shares=tuple(class_shares), natural_shares=tuple(natural_shares))
    fit.save(folder, task, **record)
    return fit, record


def label_bias(pairs: list[str], task: Task) -> np.ndarray:
    """["Standard=0.3"] (flags of --label_bias) -> float array [L] that is added to the scores. Errors: UserError."""
    bias = np.zeros(len(task.labels))
    for pair in pairs:
        label, _, value = pair.rpartition("=")
        try:
            bias[task.labels.index(label)] = float(value)
            if not np.isfinite(float(value)):
                raise ValueError
        except ValueError:
            raise UserError(f"--label_bias {pair}: expected LABEL=NUMBER with a label of {task.labels}") from None
    return bias


def with_bias(fit: Calibration, bias: np.ndarray) -> Calibration:
    """The calibration with a bias [L] added to the scores before they are divided by T."""
    return replace(fit, b=tuple((np.array(fit.b or np.zeros(len(bias))) + bias).tolist()))


def class_weights(y: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """Weights [N], 1 in the mean, under which the classes y [N] have these shares [L] (of those that occur)."""
    shares, counts = np.asarray(shares, float), np.bincount(y, minlength=len(shares))
    weights = (shares / np.maximum(counts, 1))[y]
    return weights * len(y) / weights.sum()


def class_shares(classes: Sequence[int], n_labels: int) -> tuple[float, ...]:
    """Share of each class, with one more case of each: no share is 0."""
    counts = np.bincount(classes, minlength=n_labels) + 1
    return tuple((counts / counts.sum()).tolist())


def split_record(data: str | Path, data_sha256: str, task: Task) -> dict:
    """What creditmix_prepare.py recorded of the training rows `data` in NAME_split.json beside them; {} if it did not.

    The record holds for the files whose hashes are listed there.
    """
    path = Path(data).with_name(f"{task.name}_split.json")
    split = read_json(path) if path.is_file() else {}
    return split if split.get("files", {}).get(Path(data).name) == data_sha256 else {}


def natural_shares(split: dict, task: Task) -> tuple[float, ...]:
    """Class mix before balancing, by `split_record`; () where it is not known."""
    known = split.get("natural_shares")
    return shares_of(f"{task.name}_split.json: field 'natural_shares'", known, task) if known else ()
