"""CreditMix data: raw rows -> SFT, KD and DPO files of the training customers; held-out customers are never written.

    python creditmix_prepare.py --src data/creditmix_dataset.json --outdir data
    python creditmix_prepare.py --src train.csv --outdir data --columns all  # the Kaggle CSV as downloaded, or .csv.gz
    python creditmix_prepare.py --check data/creditmix_dataset.json  # gradient boosting on the file's own split

All of it runs on a CPU in seconds. The data that come with the project, data/creditmix_dataset.json, are synthetic: no
row is a real customer's. They are drawn from data/creditmix_profile.json, aggregate figures of the public data:

    python creditmix_prepare.py --profile train.csv.gz --outdir data
    python creditmix_prepare.py --synthesize 8800 --seed 42 --outdir data
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import accuracy_score, f1_score

from common import SEED, VAL_FRAC, Task, group_hash, holdout, label_classes, unit_hash
from distill.files import ROOT, UserError, cli, file_sha256, write_json, write_jsonl
from distill.tasks.boosting import boost, out_of_fold
from distill.tasks.creditmix import balance, read_raw, row_key
from distill.tasks.creditmix_twin import profile, synthesize

TASK = ROOT / "data" / "creditmix_task.json"


def main(args):
    task = Task.load(args.task)
    if not 0 < args.val_frac < 1:
        raise UserError(f"--val_frac {args.val_frac}: expected a share between 0 and 1")
    if args.src:
        prepare(args.src, args.outdir, args.columns, args.seed, args.val_frac, task)
    elif args.check:
        check(args.check, args.columns, args.seed, args.val_frac, task)
    elif args.profile:
        rows, _ = read_raw(args.profile)
        label_classes(args.profile, rows, "answer", task)
        profile(rows, args.outdir)
    else:
        synthesize(args.synthesize, args.seed, args.outdir)


def prepare(src, outdir, columns, seed, val_frac, task):
    """Write <task>_{sft,kd,dpo}.jsonl and <task>_split.json under outdir."""
    rows, dropped = read_raw(src, columns)
    label_classes(src, rows, "answer", task)
    train, held = holdout(rows, seed, val_frac)
    chosen = balance(f"{src}: training side", train, task.labels, seed)
    chosen.sort(key=lambda r: unit_hash(f"shuffle:{seed}", row_key(r)))

    files = {"sft": [], "kd": [], "dpo": []}
    try:
        probs = out_of_fold(chosen, task.labels, seed)
    except UserError as e:  # free text has no fields: its teacher is another model
        print(f"no KD rows: {e}")
        (Path(outdir) / f"{task.name}_kd.jsonl").unlink(missing_ok=True)  # an earlier run's may be of another split
        del files["kd"]
    for i, r in enumerate(chosen):
        text, label, who = task.prompt(r["question"]), r["answer"], {"group": group_hash(r["group"])}
        files["sft"].append({"input": text, "output": label, **who})
        files["dpo"].append({"prompt": text, "chosen": label, "rejected": hard_negative(r, task.labels, seed), **who})
        if "kd" in files:
            teacher = {name: round(float(p), 6) for name, p in zip(task.labels, probs[i], strict=True)}
            answer = {"teacher_output": task.labels[probs[i].argmax()], "teacher_probs": teacher}
            files["kd"].append({"input": text, **answer, "output": label, **who})
    paths = [Path(outdir) / f"{task.name}_{stage}.jsonl" for stage in files]
    for path, content in zip(paths, files.values(), strict=True):
        write_jsonl(path, content)

    beside = Path(outdir) / f"{task.name}_task.json"  # where the trainers look for it
    if not beside.is_file() or Task.load(beside) != task:
        task.save(beside)
    sides = {"read": rows, "training": train, "written": chosen, "held_out": held}
    counts = {name: count(side, task.labels) for name, side in sides.items()}
    split = Path(outdir) / f"{task.name}_split.json"
    record = {"source": Path(src).name, "source_sha256": file_sha256(src), "columns": columns}
    record |= {"seed": seed, "val_frac": val_frac, "dropped": dict(dropped), "counts": counts}
    write_json(split, record | {"files": {path.name: file_sha256(path) for path in paths}})

    print(f"{src}: {len(rows)} usable rows, {dropped.total()} dropped")
    for reason, n in dropped.most_common():
        print(f"  dropped {n}: {reason}")
    print(pd.DataFrame(counts).T.to_string())
    print("wrote " + ", ".join(map(str, [*paths, split])))


def count(rows, labels):
    per_class = {label: sum(r["answer"] == label for r in rows) for label in labels}
    return {"rows": len(rows), "customers": len({r["group"] for r in rows}), **per_class}


def hard_negative(row, labels, seed):
    """The rejected label of a preference pair: four times of five a neighbour of the true one in the task's order."""
    distance = {label: abs(i - labels.index(row["answer"])) for i, label in enumerate(labels)}
    near, far = [k for k, d in distance.items() if d == 1], [k for k, d in distance.items() if d > 1]
    pool = far if far and unit_hash(f"far:{seed}", row_key(row)) < 0.2 else near
    return pool[int(unit_hash(f"rejected:{seed}", row_key(row)) * len(pool))]


def check(paths, columns, seed, val_frac, task):
    """Print what gradient boosting reaches on each file's own split: three seeds, at most 1,500 rows a class."""
    for path in paths:
        rows, _ = read_raw(path, columns)
        label_classes(path, rows, "answer", task)
        figures = []
        for s in range(seed, seed + 3):
            train, held = holdout(rows, s, val_frac)
            train = balance(f"{path}: training side", train, task.labels, s)
            smallest = min(Counter(r["answer"] for r in held).values(), default=0)
            held = balance(f"{path}: held-out side", held, task.labels, s, min(1500, smallest))
            truth = label_classes(path, held, "answer", task)
            guess = boost(train, task.labels, s).predict_proba([r["question"] for r in held]).argmax(1)
            figures.append([accuracy_score(truth, guess), f1_score(truth, guess, average="macro")])
            print("{}: seed {}, {} rows: accuracy {:.3f}, macro-F1 {:.3f}".format(path, s, len(held), *figures[-1]))
        print("{}: mean of 3 seeds: accuracy {:.3f}, macro-F1 {:.3f}".format(path, *np.mean(figures, 0)))


# ---------------------------------------------------------------------------------------------------------------------
# Reading: JSON, JSONL, or the public CSV with its dirt


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--src", metavar="FILE", help="rows to prepare: JSON, JSONL or the Kaggle CSV (.csv, .csv.gz)")
    what.add_argument("--check", metavar="FILE", nargs="+", help="gradient boosting on each file's own split, 3 seeds")
    what.add_argument("--profile", metavar="CSV", help="write the CSV's aggregate figures, creditmix_profile.json")
    what.add_argument("--synthesize", metavar="CUSTOMERS", type=int, help="write the synthetic creditmix_dataset.json")
    parser.add_argument("--outdir", default="data", help="folder of the files written; default data")
    parser.add_argument("--columns", choices=["six", "all"], default="six", help="CSV fields in the text; default six")
    parser.add_argument(
        "--seed", type=int, default=SEED, help="of split, balance, order and draws; default %(default)s"
    )
    parser.add_argument("--val_frac", type=float, default=VAL_FRAC, help="customers held out; default %(default)s")
    parser.add_argument("--task", default=TASK, help="labels and instruction; default data/creditmix_task.json")
    cli(main, parser)
