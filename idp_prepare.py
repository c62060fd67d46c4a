"""IDP rows: documents with their gold JSON -> data/idp_sft.jsonl, data/idp_kd.jsonl, data/idp_dpo.jsonl.

    python idp_prepare.py --src data/idp_corpus.jsonl --schema data/idp_schema.json --outdir data

From few documents --copies 6 makes more: the same ones with values of others. A copy has the hash of its original in
"copy_of", and an evaluation refuses a model that was trained on a copy of one of its documents. The corpus that comes
with the repository is generated, the same for the same seed (a second on a CPU):

    python idp_prepare.py --synthesize 600 --src data/idp_corpus.jsonl --schema data/idp_schema.json --outdir data

A corpus row is {"document", "gold"[, "group"]}, or {"document", "teacher"} where only a large model has answered. Such
rows become KD rows beside the gold, unless they tell of a held-out company. A group shares a template; without one it
is the company. No group is on both sides of the split, and no held-out row is written. eval_idp.py recomputes the split
from the same file, seed and fraction.
"""

import argparse
import random
import shlex
from collections import Counter
from pathlib import Path

from common import SEED, dev_split, group_hash, holdout, row_hash
from distill.files import UserError, between, check_output_folder, cli, read_json, read_rows, write_jsonl
from distill.model.hub import EMBEDDED
from distill.tasks.augment import swap_document_values
from distill.tasks.idp_corpus import ResultRow, read_answers, rejected_answer, without_held_out
from distill.tasks.idp_documents import idp_prompt
from distill.tasks.idp_schema import check_schema, compact, in_schema_order, schema_sha256, validator
from distill.tasks.idp_synthetic import synthesize


def main(args):
    check_output_folder("--outdir", args.outdir)
    schema = read_json(args.schema)
    check_schema(schema)
    if args.synthesize:
        write_jsonl(args.src[0], synthesize(args.synthesize, args.seed))
    corpora = {path: read_answers([path], schema, args.group_field) for path in args.src}
    rows, invalid = [row for own, _ in corpora.values() for row in own], sum(n for _, n in corpora.values())
    if args.teacher:
        taught = read_rows(args.teacher, ResultRow)
        if [r["line"] for r in taught] != list(range(1, len(rows) + 1)):
            raise UserError(
                f"{args.teacher}: expected one result per row of {args.src[0]}, as infer_idp.py writes them"
            )
        rows = [{**row, "teacher": r["output"]} for row, r in zip(rows, taught, strict=True)]

    # Held out by company, among documents with gold. The teacher's rows must not tell of a held-out one.
    gold_rows, teacher_rows = [r for r in rows if "gold" in r], [r for r in rows if "gold" not in r]
    train, held = holdout(gold_rows, args.seed, args.val_frac, args.val_start)
    if not train and not teacher_rows:
        raise UserError(
            f"{args.src[0]}: all {len(rows)} rows are held out; expected more groups or a smaller --val_frac"
        )
    teacher_rows, leaking = without_held_out(teacher_rows, held, args.group_field)

    # Copies with swapped values, not of the trainers' development rows. A teacher answered the documents as they were.
    rng = random.Random(args.seed)
    train, teacher_rows = ([{**r, "group": group_hash(r["group"])} for r in side] for side in (train, teacher_rows))
    train += copies_of(train, "gold", schema, args.copies, args.seed, rng)
    teacher_rows += copies_of(teacher_rows, "teacher", schema, args.copies, args.seed, rng)

    judge = validator(schema)
    sft, kd, dpo, made = [], [], [], Counter()
    for row in train:
        gold, source = compact(in_schema_order(row["gold"], schema)), source_of(row, schema)
        sft.append({"input": source["input"], "output": gold, **source})
        wrong = rejected_answer(row, judge, rng)
        made[wrong[0] if wrong else "none possible: no DPO row"] += 1
        if wrong:
            rejected = compact(in_schema_order(wrong[1], schema))
            pair = {k: v for k, v in source.items() if k != "input"}
            dpo.append({"prompt": source["input"], "chosen": gold, "rejected": rejected, **pair})
    for row in train * args.repeat_gold + teacher_rows:
        if args.teacher and "copy_of" in row:
            continue
        answer, source = row.get("teacher", row.get("gold")), source_of(row, schema)
        kd.append({"input": source["input"], "teacher_output": compact(in_schema_order(answer, schema)), **source})
    for name, out in (("sft", sft), ("kd", kd), ("dpo", dpo)):
        write_jsonl(args.outdir / f"idp_{name}.jsonl", out)
        print(f"{args.outdir}/idp_{name}.jsonl: {len(out)} rows")
    copies = sum("copy_of" in r for r in train + teacher_rows)
    print(f"{len(train) + len(teacher_rows) - copies} training documents and {copies} copies with swapped values")
    print(f"{len(held)} documents held out, {len({r['group'] for r in held})} groups of these")
    if invalid or leaking:
        print(f"teacher's answers left out: {invalid} not of the schema, {leaking} of held-out companies or documents")
    print("rejected answers:", ", ".join(f"{k} {n}" for k, n in made.most_common()))
    if not args.teacher and not teacher_rows:
        print("KD rows teach the gold itself; --teacher takes a larger model's answers from infer_idp.py")
    route = "kd" if args.teacher or teacher_rows else "sft"
    train_command = ["python", f"{route}_train.py", "--student", EMBEDDED]
    train_command += ["--data", args.outdir / f"idp_{route}.jsonl", "--save_dir", f"runs/idp_{route}"]
    print("next:", shlex.join(map(str, train_command)))
    judged = [path for path, (own, _) in corpora.items() if all("gold" in row for row in own)]
    if held and judged:
        command = ["python", "eval_idp.py", "--model_dir", f"runs/idp_{route}", "--data", judged[0]]
        for flag in ("schema", "group_field", "val_frac", "val_start", "seed"):  # those of the same split
            command += [f"--{flag}", getattr(args, flag)]
        print("     ", shlex.join(map(str, command)))


def copies_of(rows, answer, schema, copies, seed, rng):
    """`copies` copies of the rows outside the development split, with values of others in document and row[answer]."""
    own, _ = dev_split(rows, seed)
    own = [{**r, "gold": r[answer], "copy_of": row_hash(idp_prompt(schema, r["document"]))} for r in own]
    swapped = swap_document_values(own, copies=copies, rng=rng)
    return [
        {k: v for k, v in {**r, answer: r["gold"]}.items() if k in ("document", answer, "group", "copy_of")}
        for r in swapped
    ]


def source_of(row, schema):
    """The prompt of a row, and the fields by which splits, the overlap check and inference know what it is."""
    own = {k: row[k] for k in ("group", "copy_of") if k in row}
    return {"input": idp_prompt(schema, row["document"]), **own, "schema_sha256": schema_sha256(schema)}


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--src",
        required=True,
        type=Path,
        nargs="+",
        help='corpora: JSONL rows {"document", "gold" or "teacher"[, "group"]}',
    )
    p.add_argument("--schema", required=True, type=Path, help="JSON Schema that every gold is checked against")
    p.add_argument("--outdir", required=True, type=Path, help="folder of idp_sft.jsonl, idp_kd.jsonl, idp_dpo.jsonl")
    p.add_argument("--synthesize", type=int, default=0, metavar="N", help="first write N generated rows to --src")
    p.add_argument("--teacher", type=Path, help="infer_idp.py's results on --src, for the KD rows (default: the gold)")
    p.add_argument(
        "--copies",
        type=between(int, 0, 1000),
        default=0,
        help="copies of each training document, with values of other documents in text and gold (default 0)",
    )
    p.add_argument("--group_field", default="company", help="the gold's field that names the group (default company)")
    p.add_argument("--val_frac", type=float, default=0.33, help="share of the groups held out (default 0.33)")
    p.add_argument(
        "--val_start", type=float, default=0.0, help="where they begin: 0.5 holds out the other half (default 0)"
    )
    p.add_argument(
        "--repeat_gold",
        type=between(int, 0, 100),
        default=1,
        help="times each gold row stands among the KD rows (default 1)",
    )
    p.add_argument("--seed", type=int, default=SEED, help=f"of split, generation and mistakes (default {SEED})")
    cli(main, p)
