"""The report of a label evaluation as text and as pictures."""

from pathlib import Path

import numpy as np

from common import Task
from distill.evaluate import confusion, overlap_lines, reliability
from distill.files import atomic_write


def table(report: dict, task: Task) -> str:
    """The report as text: references first, then one line per model and kind of scores, then the natural class mix."""
    lines, measure = [""], "accuracy"
    if report["labels_from"] != "gold":
        measure = "agreement"
        lines.append(f"No held-out row has a gold label: this is agreement with the teacher {report['labels_from']}.")
    lines.append(header("scores", task.labels, measure))
    lines += [line(name, "", m) for name, m in report["references"].items() if m]
    for e in report["models"]:
        for view in ("raw", "null", "fitted"):
            if e[view]:
                warn = f"  <- {e[view]['takes_over']} takes over" if e[view]["takes_over"] else ""
                lines.append(line(e["model_dir"], view, e[view]) + warn)
    prior = report["class_prior"] or "as trained and fitted"
    mix = ", ".join(f"{label} {share:.2f}" for label, share in report["natural_shares"].items())
    lines += [f"class prior of the fitted scores: {prior}", "", f"The natural class mix ({mix}), by weighting rows:"]
    lines += [header("prior", task.labels, measure)]
    lines += [line(name, "natural", m) for name, m in report["natural_references"].items() if m]
    for e in report["models"]:
        lines += [line(e["model_dir"], k.replace("_", " "), m) for k, m in e["natural_mix"].items()]
    for e in report["models"]:
        lines += ["", *threshold_table(e["model_dir"], e["act_above"], task.labels)]
    lines.append("")
    for test in report["mcnemar"]:
        counts = f"{test['only_a_right']} against {test['only_b_right']} rows"
        p = test["permutation_p"]
        p = f"p {'< 0.0001' if p < 1e-4 else f'= {p:.2g}'} by sign flips over {test['groups']} groups"
        lines.append(f"{test['a']} / {test['b']}: right alone on {counts}, {p}")
    return "\n".join(lines + overlap_lines(report))


def header(column: str, labels: tuple, measure: str) -> str:
    first = (
        f"{'model':34} {column:9} {measure + ' [95%]':22} {'macro-F1 [95%]':22} {'log-loss':>8} {'Brier':>6} {'ECE':>6}"
    )
    return f"{first} {'at 5%':>6}  recall " + " / ".join(labels)


def line(name: str, view: str, m: dict) -> str:
    """One line of metrics; "at 5%" is the share of rows that can be decided with at most 5 % of them wrong."""
    cells = [f"{m[k]:.3f} [{m[k + '_ci95'][0]:.3f}, {m[k + '_ci95'][1]:.3f}]" for k in ("accuracy", "macro_f1")]
    numbers = f"{m['log_loss']:8.3f} {m['brier']:6.3f} {m['ece']:6.3f} {m['coverage_at_5_percent_error']:6.2f}"
    recall = " / ".join(f"{c['recall']:.2f}" if c["support"] else "-" for c in m["per_class"].values())
    return f"{name[-34:]:34} {view:9} {cells[0]:22} {cells[1]:22} {numbers}  {recall}"


def threshold_table(name: str, entries: list[dict], labels: tuple) -> list[str]:
    """Lines of `act_above`: what deciding only from a probability upward gives; by label where there are few."""

    def shown(value):
        return f"{'-':>5}" if value is None else f"{value:5.2f}"

    labels = labels if len(labels) <= 6 else ()
    columns = " ".join(f"{label[:20]:>20}" for label in labels)
    lines = [f"{name}: act above p, natural mix and prior (per label: share of rows, precision, recall)"]
    lines.append(f"{'p':>5} {'coverage':>8} {'error':>5} {columns}")
    for entry in entries:
        cells = [" ".join(map(shown, entry["per_class"][label].values())) for label in labels]
        cells = " ".join(f"{cell:>20}" for cell in cells)
        lines.append(f"{entry['p']:5.2f} {entry['coverage']:8.2f} {shown(entry['error'])} {cells}")
    return lines


def draw(name: str, scores: np.ndarray, y: np.ndarray, task: Task, path: Path) -> None:
    """Write a picture of one model: confusion matrix, reliability and risk-coverage of scores [N, L], classes y [N]."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from scipy.special import softmax

    p = softmax(scores, axis=1)
    top, right = p.max(1), p.argmax(1) == y
    figure, (left, middle, last) = plt.subplots(1, 3, figsize=(14, 4.2))
    draw_confusion(left, confusion(y, p.argmax(1), len(task.labels)), task.labels)
    draw_reliability(middle, top, right, "probability of the prediction")
    draw_risk_coverage(last, top, right, "surest rows first")
    figure.suptitle(f"{name}, {len(y)} rows")
    figure.tight_layout()
    with atomic_write(path, "wb") as f:
        figure.savefig(f, dpi=110, format="png")
    plt.close(figure)


def draw_confidence(systems: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Write a picture of {system: (confidence [N], right [N])} of answers: reliability and risk-coverage, by system."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, last) = plt.subplots(1, 2, figsize=(10, 4.2))
    for name, (confidence, right) in systems.items():
        draw_reliability(left, confidence, right, "confidence", name)
        draw_risk_coverage(last, confidence, right, "surest values first", name)
    last.legend(fontsize="small")
    figure.tight_layout()
    with atomic_write(path, "wb") as f:
        figure.savefig(f, dpi=110, format="png")
    plt.close(figure)


def draw_reliability(axis, confidence: np.ndarray, right: np.ndarray, name: str, label: str | None = None) -> None:
    """Accuracy against confidence of answers [N], in ten bins; a point's size is its bin's share."""
    points = reliability(confidence, right)
    axis.plot([0, 1], [0, 1], ":", color="gray")
    axis.scatter(
        [point["confidence"] for point in points],
        [point["accuracy"] for point in points],
        s=[10 + 400 * point["n"] / len(right) for point in points],
        label=label,
        alpha=0.7 if label else None,  # points of several systems may lie on each other
    )
    axis.set(xlabel=name, ylabel="share right", title="reliability", xlim=(0, 1), ylim=(0, 1))


def draw_risk_coverage(axis, confidence: np.ndarray, right: np.ndarray, order: str, label: str | None = None) -> None:
    """Error among the surest answers against their share, of answers [N] (Geifman and El-Yaniv 2017)."""
    counts = np.arange(1, len(right) + 1)
    axis.plot(counts / len(right), 1 - np.cumsum(right[np.argsort(-confidence)]) / counts, label=label)
    axis.set(xlabel=f"coverage, {order}", ylabel="error", title="risk-coverage", ylim=(0, None))


def confidence_table(name: str, figures: dict[str, dict], overall: str) -> list[str]:
    """Lines of what eval_idp.confidence_report says of each field, then the bins of the field `overall`."""

    def cell(value, width=6):
        return f"{'-':>{width}}" if value is None else f"{value:{width}.3f}"

    width = max(len("field"), *map(len, figures))
    columns = " ".join(f"{c:>6}" for c in ("n", "right", "conf.", "ECE", "at 5%", "above"))
    lines = [
        f"{name}: accuracy against confidence",
        "at 5%: share to accept, surest first, so that at most 5 % of it is wrong; above: the lowest confidence in it; "
        "grounded: the share if no value is accepted that the document does not have",
        f"{'field':{width}} {columns} grounded  right, if the document has the value; if not",
    ]
    for field, m in figures.items():
        keys = ("accuracy", "mean_confidence", "ece", "coverage_at_5_percent_error", "threshold")
        grounded = cell(m["coverage_at_5_percent_error_grounded"], 8)
        parts = [m["grounded"].get(k) for k in ("yes", "no")]
        shares = "; ".join(f"{part['accuracy']:.3f} of {part['n']}" if part else "-" for part in parts)
        lines.append(f"{field:{width}} {m['n']:6} {' '.join(cell(m[k]) for k in keys)} {grounded}  {shares}")
    lines += ["", f"{overall}:", f"{'confidence':>12} {'n':>6} {'mean':>6} {'right':>6}"]
    for b in figures[overall]["reliability"]:
        lines.append(f"{b['from']:>6.1f} - {b['to']:.1f} {b['n']:6} {cell(b['confidence'])} {cell(b['accuracy'])}")
    accepted = [f"{e['p']:.2f}: {e['coverage']:.2f}, {cell(e['error'], 1)}" for e in figures[overall]["act_above"]]
    return [*lines, f"accepted from a confidence of (share, error): {'; '.join(accepted)}"]


def draw_confusion(axis, matrix: np.ndarray, labels: tuple) -> None:
    """A confusion matrix [L, L], shaded by the share of its true class; figures are white on dark cells."""
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (i, j), n in np.ndenumerate(matrix):
        axis.text(j, i, n, ha="center", va="center", color="white" if share[i, j] > 0.5 else "black")
    axis.set_xticks(range(len(labels)), labels, rotation=30)
    axis.set_yticks(range(len(labels)), labels)
    axis.set(xlabel="predicted", ylabel="true", title="confusion")
