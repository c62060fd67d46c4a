"""CreditMix data: raw rows -> SFT, KD and DPO files of the training customers; held-out customers are never written.

    python creditmix_prepare.py --src data/creditmix_dataset.json --outdir data
    python creditmix_prepare.py --src train.csv --outdir data --columns all  # the Kaggle CSV as downloaded, or .csv.gz
    python creditmix_prepare.py --check data/creditmix_dataset.json  # gradient boosting on the file's own split

Each command takes seconds on a CPU. The shipped rows, data/creditmix_dataset.json, are synthetic: no row is a real
customer's. They are drawn from data/creditmix_profile.json, aggregate figures of the public data:

    python creditmix_prepare.py --profile train.csv.gz --outdir data
    python creditmix_prepare.py --synthesize 8800 --seed 42 --outdir data
"""

import argparse
from pathlib import Path

import pandas as pd

from common import SEED, VAL_FRAC, Task, group_hash, holdout, label_classes, unit_hash
from distill.calibrate import class_shares
from distill.files import ROOT, UserError, cli, file_sha256, write_json, write_jsonl
from distill.tasks.boosting import check_file, out_of_fold
from distill.tasks.creditmix import balance, read_raw, row_key
from distill.tasks.creditmix_twin import synthesize, write_profile

TASK = ROOT / "data" / "creditmix_task.json"


def main(args):
    task = Task.load(args.task)
    if not 0 < args.val_frac < 1:
        raise UserError(f"--val_frac {args.val_frac}: expected a share between 0 and 1")
    if args.src:
        prepare(args.src, args.outdir, args.columns, args.seed, args.val_frac, task)
    elif args.check:
        for path in args.check:
            check_file(path, args.columns, args.seed, args.val_frac, task)
    elif args.profile:
        write_profile(args.profile, args.outdir, task)
    else:
        synthesize(args.synthesize, args.seed, args.outdir)


def prepare(src: str | Path, outdir: str | Path, columns: str, seed: int, val_frac: float, task: Task) -> None:
    """Write NAME_{sft,kd,dpo}.jsonl, NAME_task.json and NAME_split.json of the task NAME under outdir."""
    outdir = Path(outdir)
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
        (outdir / f"{task.name}_kd.jsonl").unlink(missing_ok=True)  # an earlier run's may be of another split
        del files["kd"]
    for i, r in enumerate(chosen):
        prompt, label, group = task.prompt(r["question"]), r["answer"], {"group": group_hash(r["group"])}
        rejected = hard_negative(r, task.labels, seed)
        files["sft"].append({"input": prompt, "output": label, **group})
        files["dpo"].append({"prompt": prompt, "chosen": label, "rejected": rejected, **group})
        if "kd" in files:
            teacher = {name: round(float(p), 6) for name, p in zip(task.labels, probs[i], strict=True)}
            answer = {"teacher_output": task.labels[probs[i].argmax()], "teacher_probs": teacher}
            files["kd"].append({"input": prompt, **answer, "output": label, **group})
    paths = [outdir / f"{task.name}_{route}.jsonl" for route in files]
    for path, content in zip(paths, files.values(), strict=True):
        write_jsonl(path, content)

    beside = outdir / f"{task.name}_task.json"  # where the trainers look for it
    if not beside.is_file() or Task.load(beside) != task:
        task.save(beside)
    sides = {"read": rows, "training": train, "written": chosen, "held_out": held}
    counts = {name: count(side, task.labels) for name, side in sides.items()}
    split = outdir / f"{task.name}_split.json"
    record = {"source": Path(src).name, "source_sha256": file_sha256(src), "columns": columns}
    record |= {"seed": seed, "val_frac": val_frac, "dropped": dict(dropped), "counts": counts}
    natural = class_shares(label_classes(src, train, "answer", task), len(task.labels))  # before balancing
    record["natural_shares"] = dict(zip(task.labels, natural, strict=True))
    write_json(split, record | {"files": {path.name: file_sha256(path) for path in paths}})

    print(f"{src}: {len(rows)} usable rows, {dropped.total()} dropped")
    for reason, n in dropped.most_common():
        print(f"  dropped {n}: {reason}")
    print(pd.DataFrame(counts).T.to_string())
    print("wrote " + ", ".join(map(str, [*paths, split])))


def count(rows: list[dict], labels: tuple) -> dict[str, int]:
    """How many rows and customers there are, and rows of each class."""
    per_class = {label: sum(r["answer"] == label for r in rows) for label in labels}
    return {"rows": len(rows), "customers": len({r["group"] for r in rows}), **per_class}


def hard_negative(row: dict, labels: tuple, seed: int) -> str:
    """The rejected label of a preference pair: four times in five a neighbour of the true one in order."""
    distance = {label: abs(i - labels.index(row["answer"])) for i, label in enumerate(labels)}
    near, far = [k for k, d in distance.items() if d == 1], [k for k, d in distance.items() if d > 1]
    pool = far if far and unit_hash(f"far:{seed}", row_key(row)) < 0.2 else near
    return pool[int(unit_hash(f"rejected:{seed}", row_key(row)) * len(pool))]


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
