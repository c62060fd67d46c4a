"""Rows of a label task -> SFT, KD and DPO files of the training side; held-out rows are never written.

    python creditmix_prepare.py --src data/creditmix_dataset.json --outdir data
    python creditmix_prepare.py --src train.csv --outdir data --columns all  # the Kaggle CSV as downloaded, or .csv.gz
    python creditmix_prepare.py --check data/creditmix_dataset.json  # gradient boosting on the file's own split

A task of your own begins with a CSV or JSONL file. --init_task writes the task file, which later commands read:

    python creditmix_prepare.py --src my.csv --text_column question --label_column type --task my_task.json --init_task

Each command takes seconds on a CPU. The shipped rows, data/creditmix_dataset.json, are synthetic: no row is a real
customer's. They are drawn from data/creditmix_profile.json, aggregate figures of the public data:

    python creditmix_prepare.py --profile train.csv.gz --outdir data
    python creditmix_prepare.py --synthesize 8800 --seed 42 --outdir data
"""

import argparse
import shlex
from collections import Counter
from pathlib import Path

import pandas as pd

from common import SEED, VAL_FRAC, Task, group_hash, holdout, label_classes, unit_hash
from distill.calibrate import class_shares
from distill.files import ROOT, UserError, check_output_folder, cli, file_sha256, write_json, write_jsonl
from distill.tasks.boosting import check_file, out_of_fold
from distill.tasks.creditmix_twin import synthesize, write_profile
from distill.tasks.label_rows import BALANCE, default_balance, init_task, read_label_rows, row_key, training_rows
from distill.tasks.references import has_fields

TASK = ROOT / "data" / "creditmix_task.json"


def main(args):
    if not 0 <= args.val_frac < 1:
        raise UserError(f"--val_frac {args.val_frac}: expected a share between 0 and 1")
    if args.src and str(args.src) == "-":
        raise UserError("--src -: expected a file, which the evaluation reads again")
    check_output_folder("--outdir", Path(args.outdir))
    flags = {"text": args.text_column, "label": args.label_column, "group": args.group_column}
    flags = {name: column for name, column in flags.items() if column}
    if args.init_task:
        if not (args.src and args.task):
            raise UserError("--init_task: expected --src FILE, and --task FILE to write")
        if args.columns != "six":
            raise UserError(f"--columns {args.columns}: expected the CSV of CreditMix, without --init_task")
        init_task(Path(args.task), args.src, flags)
    task = Task.load(args.task or TASK)
    for name, column in flags.items():
        if task.columns.get(name) != column:
            found = f"--{name}_column {column}: field 'columns' of {args.task or TASK} is {task.columns}"
            raise UserError(f"{found}; expected the same there, or a new file by --task FILE --init_task")
    if args.src:
        prepare(
            args.src,
            args.outdir,
            task,
            task_path=args.task,
            columns=args.columns,
            balance=args.balance,
            seed=args.seed,
            val_frac=args.val_frac,
        )
    elif args.check:
        for path in args.check:
            check_file(path, args.columns, args.seed, args.val_frac, task)
    elif args.profile:
        write_profile(args.profile, args.outdir, task)
    else:
        synthesize(args.synthesize, args.seed, args.outdir)


def prepare(
    src: str | Path,
    outdir: str | Path,
    task: Task,
    *,
    task_path: str | Path | None = None,
    columns: str = "six",
    balance: str | None = None,
    seed: int = SEED,
    val_frac: float = VAL_FRAC,
) -> None:
    """Write NAME_{sft,kd,dpo}.jsonl, NAME_task.json and NAME_split.json of the task NAME under outdir.

    balance: "none", "smallest", or None for the task's default. task_path: of the task, for the hints.
    """
    outdir, how = Path(outdir), balance or default_balance(task)
    beside = outdir / f"{task.name}_task.json"  # where the trainers look for it
    known = Task.load(beside) if beside.is_file() else None
    rows, dropped = read_label_rows(src, task, columns)
    train, held = holdout(rows, seed, val_frac)
    labelled, unlabelled = [r for r in train if r["answer"]], [r for r in train if not r["answer"]]
    chosen = training_rows(f"{src}: training side", train, task, how, seed)
    if not train:
        raise UserError(f"{src}: no row on the training side; expected more rows or a smaller --val_frac")
    chosen.sort(key=lambda r: unit_hash(f"shuffle:{seed}", row_key(r)))

    files = {"sft": sft_rows(chosen, task), "kd": kd_rows(chosen, unlabelled, task, seed)}
    files["dpo"] = dpo_rows(chosen, task, seed)
    paths = []
    for route, content in files.items():
        path = outdir / f"{task.name}_{route}.jsonl"
        if content:
            write_jsonl(path, content)
            paths.append(path)
        else:
            path.unlink(missing_ok=True)  # an earlier run's may be of another split
    if known != task or known.columns != task.columns:
        task.save(beside)

    sides = {"read": rows, "training": train, "written": chosen + unlabelled, "held_out": held}
    counts = {name: count(side, task.labels) for name, side in sides.items()}
    natural = class_shares(label_classes(src, labelled, "answer", task), len(task.labels))  # before balancing
    record = {"source": Path(src).name, "source_sha256": file_sha256(src), "columns": columns, "balance": how}
    record |= {"seed": seed, "val_frac": val_frac, "dropped": dict(dropped), "counts": counts}
    record |= {"natural_shares": dict(zip(task.labels, natural, strict=True))}
    record["evaluate"] = evaluation_flags(src, task_path, columns, balance, seed, val_frac)
    split = outdir / f"{task.name}_split.json"
    write_json(split, record | {"files": {path.name: file_sha256(path) for path in paths}})

    print(f"{src}: {len(rows)} usable rows, {dropped.total()} dropped")
    for reason, n in dropped.most_common():
        print(f"  dropped {n}: {reason}")
    print_counts(counts, task.labels)
    if len(chosen) < len(labelled):
        print(f"balance: {len(chosen):,} of {len(labelled):,} rows kept, equally many of each class")
    if unlabelled:
        print(f"{len(unlabelled)} training rows have no label: they stand in the KD file, for a teacher to answer")
    print("wrote " + ", ".join(map(str, [*paths, split])))
    for command in next_commands(task.name, outdir, bool(chosen), record["evaluate"]):
        print(command)


def count(rows: list[dict], labels: tuple) -> dict[str, int]:
    """How many rows and customers there are, and rows of each class."""
    answers = Counter(r["answer"] for r in rows)
    per_class = {label: answers[label] for label in labels}
    unlabelled = {"without label": answers[None]} if answers[None] else {}
    return {"rows": len(rows), "customers": len({r["group"] for r in rows}), **per_class, **unlabelled}


def print_counts(counts: dict[str, dict], labels: tuple) -> None:
    """Print {side: `count` of its rows} as a table, and the classes that a side does not have."""
    table = pd.DataFrame(counts).fillna(0).astype(int).rename(index={"customers": "groups"})
    print((table if len(labels) > 6 else table.T).to_string())
    for label in labels if any(counts["written"][label] for label in labels) else ():
        if not counts["written"][label]:
            print(f"no training row is {label!r}: nothing teaches this label")
        elif counts["held_out"]["rows"] and not counts["held_out"][label]:
            print(f"no held-out row is {label!r}: a larger --val_frac or a test file of its own would measure it")


def evaluation_flags(src, task_path, columns: str, balance: str | None, seed: int, val_frac: float) -> list[str]:
    """The flags with which eval_creditmix.py reads the same rows and splits them in the same way."""
    flags = ["--data", src]
    flags += ["--task", task_path] if task_path else []
    flags += ["--columns", columns] if columns != "six" else []
    flags += ["--balance", balance] if balance else []
    flags += ["--seed", seed] if seed != SEED else []
    flags += ["--val_frac", val_frac] if val_frac != VAL_FRAC else []
    flags += ["--test", "FILE"] if not val_frac else []  # nothing is held out
    return [str(flag) for flag in flags]


def next_commands(name: str, outdir: Path, labelled: bool, flags: list[str]) -> list[str]:
    """The commands after this one: train, evaluate. flags: `evaluation_flags`."""
    route = "sft" if labelled else "kd"
    folder = f"runs/{name}_{route}"
    teacher = [] if labelled else ["--teacher", "http://HOST/v1", "--teacher_model", "NAME"]
    train = ["python", f"{route}_train.py", "--data", str(outdir / f"{name}_{route}.jsonl"), "--save_dir", folder]
    evaluate = ["python", "eval_creditmix.py", "--model_dir", folder, *flags]
    cpu = "    # without a GPU: --student smollm2-135m"
    return [f"next: {shlex.join(train + teacher)}{cpu}", f"      {shlex.join(evaluate)}"]


# ---------------------------------------------------------------------------------------------------------------------
# The rows of each route


def sft_rows(chosen: list[dict], task: Task) -> list[dict]:
    return [{"input": task.prompt(r["question"]), "output": r["answer"], **group_of(r)} for r in chosen]


def dpo_rows(chosen: list[dict], task: Task, seed: int) -> list[dict]:
    return [
        {
            "prompt": task.prompt(r["question"]),
            "chosen": r["answer"],
            "rejected": hard_negative(r, task.labels, seed),
            **group_of(r),
        }
        for r in chosen
    ]


def kd_rows(chosen: list[dict], unlabelled: list[dict], task: Task, seed: int) -> list[dict]:
    """Labelled rows with gradient boosting's answer, then those without a label and without an answer.

    Free text has no fields for gradient boosting. Its labelled rows stand here only beside unlabelled ones, with their
    own label as the answer; alone they would repeat the SFT file.
    """
    rows = [{"input": task.prompt(r["question"]), "output": r["answer"], **group_of(r)} for r in chosen]
    probs, why = None, "gradient boosting teaches texts of fields, 'Key: value, Key: value'"
    if has_fields(chosen):
        try:
            probs = out_of_fold(chosen, task.labels, seed)
        except UserError as e:
            why = str(e)
    if probs is not None:
        for row, p in zip(rows, probs, strict=True):
            row["teacher_output"] = task.labels[p.argmax()]
            row["teacher_probs"] = {label: round(float(x), 6) for label, x in zip(task.labels, p, strict=True)}
    elif unlabelled:
        rows = [{"teacher_output": r["output"], **r} for r in rows]
    else:
        print(f"no KD rows: {why}; kd_train.py --teacher takes the SFT rows too")
        return []
    return rows + [{"input": task.prompt(r["question"]), **group_of(r)} for r in unlabelled]


def group_of(row: dict) -> dict[str, str]:
    return {"group": group_hash(row["group"])}


def hard_negative(row: dict, labels: tuple, seed: int) -> str:
    """The rejected label of a preference pair: four times in five a neighbour of the true one in order."""
    distance = {label: abs(i - labels.index(row["answer"])) for i, label in enumerate(labels)}
    near, far = [k for k, d in distance.items() if d == 1], [k for k, d in distance.items() if d > 1]
    pool = far if far and unit_hash(f"far:{seed}", row_key(row)) < 0.2 else near
    return pool[int(unit_hash(f"rejected:{seed}", row_key(row)) * len(pool))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--src", metavar="FILE", help="rows to prepare: CSV, JSON or JSONL, .gz too")
    what.add_argument("--check", metavar="FILE", nargs="+", help="gradient boosting on each file's own split, 3 seeds")
    what.add_argument("--profile", metavar="CSV", help="write the CSV's aggregate figures, creditmix_profile.json")
    what.add_argument("--synthesize", metavar="CUSTOMERS", type=int, help="write the synthetic creditmix_dataset.json")
    parser.add_argument("--task", help="labels, instruction and columns; default data/creditmix_task.json")
    parser.add_argument("--init_task", action="store_true", help="write --task from the rows, if it is not there")
    parser.add_argument("--text_column", metavar="NAME", help="column of the text, for --init_task")
    parser.add_argument(
        "--label_column", metavar="NAME", help="column of the label; empty cells are kept for a teacher"
    )
    parser.add_argument("--group_column", metavar="NAME", help="column whose rows of one value stay together")
    parser.add_argument("--outdir", default="data", help="folder of the files written; default data")
    parser.add_argument(
        "--columns", choices=["six", "all"], default="six", help="fields of the Kaggle CSV; default six"
    )
    parser.add_argument(
        "--seed", type=int, default=SEED, help="of split, balance, order and draws; default %(default)s"
    )
    parser.add_argument("--val_frac", type=float, default=VAL_FRAC, help="share held out; default %(default)s")
    parser.add_argument(
        "--balance", choices=BALANCE, help="rows of each class; default smallest for CreditMix, none elsewhere"
    )
    cli(main, parser)
