"""Evaluate models of a label task on the same held-out rows, beside references: one table, report.json, pictures.

    python eval_creditmix.py --model_dir Qwen/Qwen2.5-3B-Instruct runs/creditmix_sft runs/creditmix_kd \
        --data data/creditmix_dataset.json --val_per_class 1500
    python eval_creditmix.py --model_dir smollm2-135m runs/smollm2_sft --val_per_class 50  # CPU
    python eval_creditmix.py --model_dir runs/my_sft --data my.csv --test my_test.csv --task my_task.json

Held-out rows are those of the customers that creditmix_prepare.py kept apart (same file, same seed), or the rows of
--test. A model that was trained on one of them is refused. Intervals resample customers, because the months of a
customer are not independent. Where no held-out row has a label, --teacher gives them, and the figures are agreement
with that teacher.
"""

import argparse
import json
import os
import re
from dataclasses import asdict, replace
from datetime import datetime
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.special import softmax

from common import (
    SEED,
    VAL_FRAC,
    Calibration,
    LabelScorer,
    Task,
    dev_split,
    group_hash,
    holdout,
    label_classes,
    load_model,
    row_hash,
)
from distill.calibrate import class_shares, class_weights, fit_and_save, label_bias, with_bias
from distill.evaluate import act_above, check_overlap, compare, metrics, overlap_record, trained_rows
from distill.files import (
    ROOT,
    UserError,
    atomic_write,
    between,
    check_output_folder,
    cli,
    file_sha256,
    positive,
    sha256,
    write_json,
    write_jsonl,
)
from distill.hardware import device
from distill.model.hub import adapter_base, base_config, check_models
from distill.report import draw, table
from distill.run_record import run_record
from distill.tasks.label_rows import (
    BALANCE,
    default_balance,
    read_label_rows,
    read_test_rows,
    rows_per_class,
    training_rows,
)
from distill.tasks.references import has_fields, references
from distill.train.teacher_endpoint import Endpoint
from distill.train.teachers import Teacher, check_teacher, teach

TASK = ROOT / "data" / "creditmix_task.json"
SCORER = 2  # raised when a change of the scorer changes scores: cached ones are then computed again
DEV_ROWS = 1000  # to fit a calibration on


def main(args):
    if int(os.environ.get("RANK", 0)):  # under `accelerate launch` one process evaluates, since models are small
        return
    out = args.out or Path("runs/reports") / datetime.now().strftime("%Y%m%d-%H%M%S")
    check_output_folder("--out", out)
    task = common_task(args.model_dir, args.task)
    bias = label_bias(args.label_bias, task)
    endpoint = Endpoint(args.teacher, args.teacher_model) if args.teacher and "://" in args.teacher else None
    teacher = Teacher(args.teacher, args.precision, endpoint) if args.teacher else None

    # The rows: held out by customer or from a file of their own, and what the models were trained on.
    rows, dropped = read_label_rows(args.data, task, args.columns)
    train, held = holdout(rows, args.seed, args.val_frac)
    if args.test:
        held, more = read_test_rows(args.test, task, args.columns, args.data, train, args.allow_overlap)
        dropped += more
    for reason, n in dropped.items():
        print(f"dropped {n} rows: {reason}")
    labels_from, held = with_labels(args.test or args.data, held, task, teacher, args.model_dir[0])
    held = rows_per_class(held, task, args.val_per_class, args.seed)
    y = label_classes(args.test or args.data, held, "answer", task)
    groups = np.unique([r["group"] for r in held], return_inverse=True)[1]
    counts = ", ".join(f"{label} {(y == i).sum()}" for i, label in enumerate(task.labels))
    print(f"{len(held)} held-out rows of {groups.max(initial=-1) + 1} groups: {counts}")
    absent = [label for i, label in enumerate(task.labels) if i not in y]
    if absent:
        print(f"no held-out row is {', '.join(absent)}: macro-F1 is the mean of the other classes")
    side = f"{args.data}: training side"
    trained_on = training_rows(side, train, task, args.balance or default_balance(task), args.seed)
    train = [r for r in train if r["answer"]]
    dev = dev_rows(trained_on, task, args.seed) if args.fit_calibration else []
    natural, trained = (
        class_shares(label_classes(args.data, side, "answer", task), len(task.labels)) for side in (train, trained_on)
    )
    Calibration(natural_shares=natural).for_prior(args.class_prior, task)  # an error, before a model is loaded
    weights = class_weights(y, natural)  # the held-out rows, weighted to the natural class mix

    # The models: a text task has no fields for gradient boosting, so the untrained base is a reference as well.
    names = args.model_dir
    if not has_fields(rows):
        names = names + untrained_bases(names)
    check_models(names)
    prompts = [task.prompt(r["question"]) for r in held]
    overlap = {name: check_overlap(name, [[p] for p in prompts], args.allow_overlap) for name in names}

    report = {
        "n": len(held),
        "labels_from": labels_from,
        "seed": args.seed,
        **overlap_record(overlap),
        "rows_dropped": dict(dropped),
    }
    report |= {"class_prior": args.class_prior, "natural_shares": dict(zip(task.labels, natural, strict=True))}
    report |= {"references": {}, "natural_references": {}, "models": []}
    for name, found in references(train, trained_on, held, task).items():
        report["references"][name] = report["natural_references"][name] = None
        if found is not None:
            shift = 0 if name == "majority" else np.log(natural) - np.log(trained)
            report["references"][name] = metrics(found, y, groups, task)
            report["natural_references"][name] = metrics(found + shift, y, groups, task, weights)
    right, predictions = {}, [{"question": r["question"], "answer": r["answer"]} for r in held]
    for name in names:
        seen = trained_rows(name) or ()
        own_dev = [r for r in dev if row_hash(r["input"]) not in seen]
        dev_prompts = [r["input"] for r in own_dev]
        raw, dev_raw, prior, rows_per_s = score(name, task, prompts, dev_prompts, args.precision, out)
        if args.fit_calibration:
            fit = fit_on(name, dev_raw, prior, own_dev, task, trained, natural, bias, out)
        else:
            fit = with_bias(Calibration.load(name, task), bias)
        fit = replace(fit, natural_shares=natural)
        served, natural_fit = fit.for_prior(args.class_prior, task), fit.for_prior("natural", task)
        scores = served(raw, prior)  # what infer and serve answer: null calibration where nothing is fitted
        entry = {"model_dir": name, "rows_per_s": rows_per_s, "train_overlap": overlap[name], "prior": prior.tolist()}
        entry["calibration"] = asdict(served)
        views = {"raw": raw, "null": raw - prior + bias, "fitted": scores if served.fitted else None}
        for view, found in views.items():
            entry[view] = None if found is None else metrics(found, y, groups, task)
        mix = {"as_served": scores, "natural": natural_fit(raw, prior)}
        entry["natural_mix"] = {view: metrics(found, y, groups, task, weights) for view, found in mix.items()}
        entry["act_above"] = act_above(softmax(mix["natural"], axis=1), y, task.labels, weights)
        report["models"].append(entry)
        right[name] = scores.argmax(1) == y
        for line, r, s in zip(predictions, raw, scores, strict=True):
            line[name] = {"prediction": task.labels[int(s.argmax())], "raw": r.tolist(), "scores": s.tolist()}
        draw(name, scores, y, task, out / f"{picture_name(name, names)}.png")
    report["mcnemar"] = [
        {"a": a, "b": b, **compare(right[a], right[b], groups)} for a, b in combinations(names, 2) if a != b
    ]
    report |= {"data": str(args.data), "data_sha256": file_sha256(args.data), **run_record(args)}
    report |= {"test_sha256": file_sha256(args.test)} if args.test else {}
    text = table(report, task)
    print(text)
    write_json(out / "report.json", report)
    write_jsonl(out / "predictions.jsonl", predictions)
    with atomic_write(out / "report.txt") as f:
        f.write(text + "\n")
    print(f"report.json, predictions.jsonl and pictures in {out}")


# ---------------------------------------------------------------------------------------------------------------------
# Rows and flags


def common_task(names: list[str], given: Path | None) -> Task:
    """The task of all models; a model without task.json has the given one, by default CreditMix's.

    The columns of the rows are those of the given file. Error: UserError where the models' tasks differ.
    """
    tasks = [Task.of(name, given or TASK) for name in names]
    for name, task in zip(names, tasks, strict=True):
        if task != tasks[0]:
            raise UserError(f"{name}: its task is not that of {names[0]}; expected the same labels and template")
    return replace(tasks[0], columns=Task.load(given).columns) if given else tasks[0]


def with_labels(path: Path, held: list[dict], task: Task, teacher: Teacher | None, model: str):
    """(whose labels they are, the rows that have one). Where no row has a gold label, the teacher answers them all."""
    gold = [r for r in held if r["answer"]]
    if gold and len(gold) < len(held):
        print(f"{len(held) - len(gold)} held-out rows have no label and are left out")
    if gold:
        if teacher:
            print(f"held-out rows have labels: --teacher {teacher.name} is not asked")
        return "gold", gold
    if not held:
        raise UserError(f"{path}: no held-out rows; expected more customers, a larger --val_frac, or --test FILE")
    if not teacher:
        raise UserError(f"{path}: no held-out row has a label; expected some, or --teacher to agree with")
    check_teacher(teacher, model, task)
    asked = [{"input": task.prompt(r["question"]), "row": r} for r in held]
    adapter = (Path(model) / "adapter_config.json").is_file()
    tokenizer = base_config(adapter_base(model) if adapter else model)[2]  # counts the tokens of the prompts
    asked, _ = teach(teacher, asked, task, tokenizer, data=path, max_len=tokenizer.model_max_length, seed=SEED)
    return teacher.name, [{**r["row"], "answer": r["teacher_output"]} for r in asked]


def dev_rows(trained_on: list[dict], task: Task, seed: int) -> list[dict]:
    """The development rows of the trainers, as rows with input and output."""
    rows = [
        {"input": task.prompt(r["question"]), "output": r["answer"], "group": group_hash(r["group"])}
        for r in trained_on
    ]
    return dev_split(rows, seed, limit=DEV_ROWS)[1]


def untrained_bases(names: list[str]) -> list[str]:
    """The base models of adapters, where they are not among the models themselves."""
    bases = {adapter_base(name) for name in names if (Path(name) / "adapter_config.json").is_file()}
    bases = sorted(bases - set(map(str, names)))
    for base in bases:
        print(f"{base}: evaluated as well, the untrained reference")
    return bases


def picture_name(name: str, names: list[str]) -> str:
    """A model's file name: the last part of its path, or all of it where several models share that."""
    if sum(Path(other).name == Path(name).name for other in names) > 1:
        return re.sub(r"[^\w.-]+", "_", str(name)).strip("_")
    return Path(name).name


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def score(name: str, task: Task, prompts: list[str], dev_prompts: list[str], precision: str, out: Path):
    """(raw [N, L], development raw [D, L], prior [L], rows per second); cached in `out`, so a stopped run goes on."""
    files = sorted(
        p for p in Path(name).glob("*") if p.suffix in (".safetensors", ".json") and p.name != "calibration.json"
    )
    weights = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    prompts, n = prompts + dev_prompts, len(prompts)
    key = sha256(json.dumps([SCORER, name, weights, asdict(task), precision, str(device()), prompts]))
    cache = out / f".scores-{key[:16]}.json"
    if cache.is_file():
        found = json.loads(cache.read_text(encoding="utf-8"))
    else:
        model, tokenizer = load_model(name, precision)
        scorer = LabelScorer(model, tokenizer, task.labels, task.null_prompts())
        prior = scorer.prior(task)
        start = datetime.now()
        raw = scorer.score(prompts, progress=True)
        seconds = (datetime.now() - start).total_seconds()
        found = {"raw": raw.tolist(), "prior": prior.tolist(), "rows_per_s": round(len(raw) / seconds, 2)}
        write_json(cache, found)
    raw = np.array(found["raw"])
    return raw[:n], raw[n:], np.array(found["prior"]), found["rows_per_s"]


def fit_on(name: str, raw, prior, dev: list[dict], task: Task, trained, natural, bias, out: Path) -> Calibration:
    """Choose a calibration on development rows; calibration.json goes beside an adapter, else into the report's folder.

    trained, natural: class mix [L] of the training rows and before balancing. bias [L] becomes part of b.
    """
    if not dev:
        raise UserError(f"{name}: no development row that it was not trained on; expected the --seed of its training")
    y = label_classes("development rows", dev, "output", task)
    folder = Path(name) if (Path(name) / "adapter_config.json").is_file() else out
    fit, record = fit_and_save(folder, task, raw, prior, y, [r["group"] for r in dev], trained, natural, bias)
    print(f"{name}: {record['chosen']} scores chosen on {len(y)} development rows, {record['reason']}")
    print(f"kept in {folder / 'calibration.json'}")
    return fit


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model_dir", nargs="+", required=True, help="adapters, model folders or hub ids, in one table")
    p.add_argument(
        "--data",
        type=Path,
        default=Path("data/creditmix_dataset.json"),
        help="the rows that were prepared: CSV or JSON",
    )
    p.add_argument("--test", type=Path, help="rows of a file of their own, in place of those held out of --data")
    p.add_argument("--task", type=Path, help="columns of the rows, and the task of models without task.json")
    p.add_argument("--val_per_class", type=positive(int), help="held-out rows a class; default: all held-out rows")
    p.add_argument(
        "--val_frac", type=between(float, 0, 1), default=VAL_FRAC, help="share held out (default: %(default)s)"
    )
    p.add_argument("--balance", choices=BALANCE, help="of the training rows, as in creditmix_prepare.py")
    p.add_argument("--teacher", help="model or http://host/v1 that labels held-out rows where none has a label")
    p.add_argument("--teacher_model", help="the model's name at an http teacher; its key: OPENAI_API_KEY")
    p.add_argument(
        "--columns", choices=["six", "all"], default="six", help="of the Kaggle CSV, as in creditmix_prepare.py"
    )
    p.add_argument("--seed", type=int, default=SEED, help="of the split, as in creditmix_prepare.py (default: 42)")
    p.add_argument("--fit_calibration", action="store_true", help="choose w, b, T on development rows and keep them")
    p.add_argument(
        "--label_bias",
        nargs="*",
        default=[],
        metavar="LABEL=X",
        help="added to scores; --fit_calibration keeps it in b",
    )
    p.add_argument(
        "--class_prior", metavar="natural|balanced|JSON|FILE", help="class mix to answer for; default: that of training"
    )
    p.add_argument("--allow_overlap", action="store_true", help="evaluate on trained rows all the same, and say so")
    p.add_argument("--precision", choices=["auto", "nf4", "bf16", "fp32"], default="auto", help="of the base model")
    p.add_argument("--out", type=Path, help="folder of the report; default: runs/reports/TIME")
    cli(main, p)
