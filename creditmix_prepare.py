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
import gzip
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import accuracy_score, f1_score

from common import (
    ROOT,
    SEED,
    VAL_FRAC,
    Task,
    UserError,
    cli,
    file_sha256,
    group_hash,
    holdout,
    label_classes,
    read_rows,
    unit_hash,
    write_json,
    write_jsonl,
)
from distill.boosting import boost, out_of_fold
from distill.fields import SIX, customer, features_text
from distill.twin import profile, synthesize

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


def row_key(row):
    return f"{row['group']}:{row['question']}"


def balance(place, rows, labels, seed, n=None):
    """`n` rows of each class, by default as many as the smallest has: one of every customer, then a second, and so on.

    Which of a customer's rows come first is a hash of seed and row. (A customer's months are near copies of each other,
    so more customers say more than more months.)
    Errors: UserError beginning with `place`, naming the class with fewer than n rows, or with none.
    """
    by_class = {label: [r for r in rows if r["answer"] == label] for label in labels}
    smallest = min(labels, key=lambda label: len(by_class[label]))
    have = len(by_class[smallest])
    if have < (n or 1):
        raise UserError(f"{place}: class {smallest!r} has {have} rows; expected at least {n or 1}")
    for same in by_class.values():
        same.sort(key=lambda r: unit_hash(f"balance:{seed}", row_key(r)))
        seen, turns = Counter(), []
        for r in same:
            seen[r["group"]] += 1
            turns.append(seen[r["group"]])
        same[:] = [same[i] for i in np.argsort(turns, kind="stable")]
    return [r for label in labels for r in by_class[label][: n or have]]


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


def read_raw(path, columns="six"):
    """Rows {"question": features text, "answer": label, "group": customer} of a source, and a Counter of dropped rows.

    path: JSON or JSONL in that form ("group" optional), or the public credit-score CSV (.csv, .csv.gz).
    columns: "six" fields in the text, or "all" the CSV's informative ones.
    """
    if str(path).endswith((".csv", ".csv.gz")):
        return read_csv(path, columns)
    if columns != "six":
        raise UserError(f"{path}: --columns {columns}: expected the CSV; the texts of this file are as they are")
    rows = read_rows(path, {"question": str, "answer": str}, {"group": str})
    return [{**r, "group": r.get("group") or customer(r["question"])} for r in rows], Counter()


def read_csv(path, columns="six"):
    """The public CSV as downloaded -> rows and dropped as read_raw.

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


def read_table(path, fields):
    """A CSV's columns `fields` (its underscores as blanks) as text, NaN where the public data's marks say missing."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
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
            raise UserError(
                f"{path}:1: column '{name.replace(' ', '_')}' is missing; expected the public data's columns"
            )
    for line, label in enumerate(raw["Credit Mix"], 2):
        if label not in ("Good", "Standard", "Bad", *MISSING):
            raise UserError(f"{path}:{line}: column 'Credit_Mix': expected Good, Standard, Bad or _, got {label!r}")
    return raw[fields].where(~raw[fields].isin(MISSING))


def usual(values, who):
    """Each row's customer's commonest value (the smallest of equals: the dirt inflates), NaN where there is none."""
    counts = pd.DataFrame({"who": who, "value": values}).value_counts().reset_index()
    counts = counts.sort_values(["count", "value"], ascending=[False, True]).drop_duplicates("who")
    return who.map(counts.set_index("who")["value"])


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
