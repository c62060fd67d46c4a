"""Evaluate models of a label task on the same held-out rows, beside references: one table, report.json, pictures.

    python eval_creditmix.py --model_dir Qwen/Qwen2.5-3B-Instruct runs/creditmix_sft runs/creditmix_kd \
        --data data/creditmix_dataset.json --val_per_class 1500
    python eval_creditmix.py --model_dir smollm2-135m runs/smollm2_sft --val_per_class 50  # CPU

Held out are the customers that creditmix_prepare.py kept apart (same file, same seed). A model that was trained on one
of the rows is refused. Intervals resample customers, since the months of one are not independent.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from dataclasses import asdict
from datetime import datetime
from itertools import combinations
from pathlib import Path

import numpy as np

from common import (
    SEED,
    VAL_FRAC,
    Calibration,
    LabelScorer,
    Task,
    dev_split,
    fit_and_save,
    group_hash,
    holdout,
    label_classes,
    load_model,
    row_hash,
    unit_hash,
)
from distill.evaluate import check_overlap, confusion, mcnemar, metrics, trained_rows
from distill.files import UserError, atomic_write, cli, file_sha256, positive, sha256, write_json, write_jsonl
from distill.hardware import device
from distill.model.hub import check_models
from distill.run_record import run_record
from distill.tasks.boosting import boost
from distill.tasks.creditmix import balance, pick, read_raw

SCORER = 2  # raised when a change of the scorer changes scores: those kept from before are then made again


def main(args):
    if int(os.environ.get("RANK", 0)):  # under `accelerate launch` one process evaluates, since models are small
        return
    out = args.out or Path("runs/reports") / datetime.now().strftime("%Y%m%d-%H%M%S")
    tasks = [Task.of(name, args.task) for name in args.model_dir]
    task = tasks[0]
    for name, other in zip(args.model_dir, tasks, strict=True):
        if other != task:
            raise UserError(
                f"{name}: its task is not that of {args.model_dir[0]}; expected the same labels and template"
            )
    check_models(args.model_dir)
    bias = label_bias(args.label_bias, task)
    rows, dropped = read_raw(args.data, args.columns)
    label_classes(args.data, rows, "answer", task)
    train, held = holdout(rows, args.seed, args.val_frac)
    held = pick(held, task, args.val_per_class, args.seed)
    y = label_classes(args.data, held, "answer", task)
    dev = dev_rows(args.data, train, task, args.seed)
    overlap = {name: check_overlap(name, held, task, args.allow_overlap) for name in args.model_dir}
    print(f"{len(held)} held-out rows of {len({r['group'] for r in held})} customers: {class_counts(y, task)}")

    if not held:
        raise UserError(f"{args.data}: no held-out rows; expected more customers or a larger --val_frac")
    groups = np.unique([r["group"] for r in held], return_inverse=True)[1]
    report = {"n": len(held), "seed": args.seed, "overlap": sum(overlap.values()), "rows_dropped": dict(dropped)}
    report["references"] = references(args.data, train, held, y, groups, task, args.seed)
    report["models"], right, predictions = [], {}, [{"question": r["question"], "answer": r["answer"]} for r in held]
    for name in args.model_dir:
        own_dev = [r for r in dev if row_hash(r["input"]) not in trained_rows(name)] if args.fit_calibration else []
        raw, prior, dev_raw, rows_per_s = score(name, task, held, own_dev, out, args)
        fit = Calibration.load(name, task)
        if args.fit_calibration:
            fit = fit_on(name, dev_raw, prior, own_dev, task, out)
        entry = {"model_dir": name, "rows_per_s": rows_per_s, "train_overlap": overlap[name], "prior": prior.tolist()}
        views = {"raw": raw, "null": raw - prior + bias, "fitted": fit(raw + bias, prior) if fit.fitted else None}
        for view, scores in views.items():
            entry[view] = None if scores is None else metrics(scores, y, groups, task)
        report["models"].append(entry)
        best = fit(raw + bias, prior)  # what infer and serve answer: null calibration where nothing is fitted
        right[name] = best.argmax(1) == y
        for line, r, s in zip(predictions, raw, best, strict=True):
            line[name] = {"prediction": task.labels[int(s.argmax())], "raw": r.tolist(), "scores": s.tolist()}
        same = sum(Path(other).name == Path(name).name for other in args.model_dir) > 1
        picture = re.sub(r"[^\w.-]+", "_", str(name)).strip("_") if same else Path(name).name
        draw(name, best, y, task, out / f"{picture}.png")
    report["mcnemar"] = [
        {"a": a, "b": b, **mcnemar(right[a], right[b])} for a, b in combinations(args.model_dir, 2) if a != b
    ]
    report |= {"data": str(args.data), "data_sha256": file_sha256(args.data), **run_record(args)}
    text = table(report, task)
    print(text)
    write_json(out / "report.json", report)
    write_jsonl(out / "predictions.jsonl", predictions)
    with atomic_write(out / "report.txt") as f:
        f.write(text + "\n")
    print(f"report.json, predictions.jsonl and pictures in {out}")


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def dev_rows(path, train, task, seed, most=1000):
    """The development rows that the trainers keep apart, as rows with input and output."""
    rows = [
        {"input": task.prompt(r["question"]), "output": r["answer"], "group": group_hash(r["group"])}
        for r in balance(path, train, task.labels, seed)
    ]
    return sorted(dev_split(rows, seed)[1], key=lambda r: unit_hash(seed, r["input"]))[:most]


def label_bias(pairs, task):
    """["Standard=0.3"] -> array [L] of what the operator adds to the scores."""
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


def class_counts(classes, task):
    counts = np.bincount(classes, minlength=len(task.labels))
    return ", ".join(f"{label} {n}" for label, n in zip(task.labels, counts, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def score(name, task, held, dev, out, args):
    """(raw [N, L], prior [L], development raw [D, L], rows per second); kept under `out`, so a stopped run goes on."""
    files = sorted(
        p for p in Path(name).glob("*") if p.suffix in (".safetensors", ".json") and p.name != "calibration.json"
    )
    weights = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    prompts = [task.prompt(r["question"]) for r in held] + [r["input"] for r in dev]
    key = sha256(json.dumps([SCORER, name, weights, asdict(task), args.precision, str(device()), prompts]))
    cache = out / f".scores-{key[:16]}.json"
    if cache.is_file():
        found = json.loads(cache.read_text(encoding="utf-8"))
    else:
        model, tokenizer = load_model(name, args.precision)
        scorer = LabelScorer(model, tokenizer, task.labels, task.null_prompts())
        prior = scorer.prior(task)
        start = datetime.now()
        raw = scorer.score(prompts, progress=True)
        seconds = (datetime.now() - start).total_seconds()
        found = {"raw": raw.tolist(), "prior": prior.tolist(), "rows_per_s": round(len(raw) / seconds, 2)}
        write_json(cache, found)
    raw = np.array(found["raw"])
    return raw[: len(held)], np.array(found["prior"]), raw[len(held) :], found["rows_per_s"]


def fit_on(name, raw, prior, dev, task, out):
    """Fit on development rows; calibration.json goes beside an adapter, else into the report's folder."""
    if not dev:
        raise UserError(f"{name}: no development row that it was not trained on; expected the --seed of its training")
    y = label_classes("development rows", dev, "output", task)
    folder = Path(name) if (Path(name) / "adapter_config.json").is_file() else out
    fit = fit_and_save(folder, task, raw, prior, y)
    print(f"{name}: fitted on {len(y)} development rows: {folder / 'calibration.json'}")
    return fit


def references(path, train, held, y, groups, task, seed):
    """The training side's majority class, and gradient boosting on the same fields (None for free text)."""
    most = Counter(r["answer"] for r in train)
    prior = np.array([max(most[label], 0.5) / len(train) for label in task.labels])
    found = {"majority": metrics(np.log(np.tile(prior, (len(y), 1))), y, groups, task)}
    train = balance(path, train, task.labels, seed)
    try:
        p = boost(train, task.labels).predict_proba([r["question"] for r in held])
        found["gradient_boosting"] = metrics(np.log(np.clip(p, 1e-9, 1)), y, groups, task)
    except UserError as e:
        print(f"no gradient boosting reference: {e}", file=sys.stderr)
        found["gradient_boosting"] = None
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Table and pictures


def table(report, task):
    """The report as text: a line for each model and calibration, references first."""
    head = (
        f"{'model':34} {'scores':7} {'accuracy [95%]':22} {'macro-F1 [95%]':22} {'log-loss':>8} {'Brier':>6} {'ECE':>6}"
    )
    lines = ["", head + "  recall " + " / ".join(task.labels)]
    entries = [(name, "", m) for name, m in report["references"].items()]
    entries += [(e["model_dir"], view, e[view]) for e in report["models"] for view in ("raw", "null", "fitted")]
    for name, view, m in entries:
        if m:
            cells = [f"{m[k]:.3f} [{m[k + '_ci95'][0]:.3f}, {m[k + '_ci95'][1]:.3f}]" for k in ("accuracy", "macro_f1")]
            recall = " / ".join(f"{c['recall']:.2f}" for c in m["per_class"].values())
            numbers = f"{m['log_loss']:8.3f} {m['brier']:6.3f} {m['ece']:6.3f}"
            warn = f"  <- {m['takes_over']} takes over" if m["takes_over"] and view else ""
            lines.append(f"{name[-34:]:34} {view:7} {cells[0]:22} {cells[1]:22} {numbers}  {recall}{warn}")
    for test in report["mcnemar"]:
        counts = f"{test['only_a_right']} against {test['only_b_right']} rows"
        lines.append(f"McNemar {test['a']} / {test['b']}: right alone on {counts}, p = {test['p']:.2g}")
    if report["overlap"]:
        lines.append(f"WARNING: {report['overlap']} evaluation rows were trained on; these figures measure memory")
    return "\n".join(lines)


def draw(name, scores, y, task, path):
    """Confusion matrix, reliability and risk-coverage of one model, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from scipy.special import softmax

    p = softmax(scores, axis=1)
    top, right = p.max(1), p.argmax(1) == y
    matrix = confusion(y, p.argmax(1), len(task.labels))
    figure, (left, middle, last) = plt.subplots(1, 3, figsize=(14, 4.2))
    left.imshow(matrix / np.maximum(matrix.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    for (i, j), n in np.ndenumerate(matrix):
        left.text(j, i, n, ha="center", va="center")
    left.set_xticks(range(len(task.labels)), task.labels, rotation=30)
    left.set_yticks(range(len(task.labels)), task.labels)
    left.set(xlabel="predicted", ylabel="true", title="confusion")
    where = np.minimum((top * 10).astype(int), 9)
    points = [(top[where == b].mean(), right[where == b].mean(), (where == b).sum()) for b in np.unique(where)]
    x, height, size = zip(*points, strict=True)
    middle.plot([0, 1], [0, 1], ":", color="gray")
    middle.scatter(x, height, s=[10 + 400 * n / len(y) for n in size])
    middle.set(
        xlabel="probability of the prediction", ylabel="share right", title="reliability", xlim=(0, 1), ylim=(0, 1)
    )
    order = np.argsort(-top)
    last.plot(np.arange(1, len(y) + 1) / len(y), 1 - np.cumsum(right[order]) / np.arange(1, len(y) + 1))
    last.set(xlabel="coverage, surest rows first", ylabel="error", title="risk-coverage", ylim=(0, None))
    figure.suptitle(f"{name}, {len(y)} rows")
    figure.tight_layout()
    with atomic_write(path, "wb") as f:
        figure.savefig(f, dpi=110, format="png")
    plt.close(figure)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model_dir", nargs="+", required=True, help="adapters, model folders or hub ids, in one table")
    p.add_argument("--data", type=Path, default=Path("data/creditmix_dataset.json"), help="raw rows, or the Kaggle CSV")
    p.add_argument("--task", type=Path, default=Path("data/creditmix_task.json"), help="for models without task.json")
    p.add_argument("--val_per_class", type=positive(int), help="held-out rows a class; default: all held-out rows")
    p.add_argument(
        "--val_frac", type=positive(float), default=VAL_FRAC, help="share of customers held out (default: %(default)s)"
    )
    p.add_argument("--columns", choices=["six", "all"], default="six", help="CSV columns, as in creditmix_prepare.py")
    p.add_argument("--seed", type=int, default=SEED, help="of the split, as in creditmix_prepare.py (default: 42)")
    p.add_argument("--fit_calibration", action="store_true", help="fit w, b, T on development rows and keep them")
    p.add_argument("--label_bias", nargs="*", default=[], metavar="LABEL=X", help="the operator's own: added to scores")
    p.add_argument("--allow_overlap", action="store_true", help="evaluate on trained rows all the same, and say so")
    p.add_argument("--precision", choices=["auto", "nf4", "bf16", "fp32"], default="auto", help="of the base model")
    p.add_argument("--out", type=Path, help="folder of the report; default: runs/reports/TIME")
    cli(main, p)
