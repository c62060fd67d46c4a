"""IDP rows: documents with their gold JSON -> data/idp_sft.jsonl, data/idp_kd.jsonl, data/idp_dpo.jsonl.

    python idp_prepare.py --src data/idp_corpus.jsonl --schema data/idp_schema.json --outdir data

From few documents --copies 6 makes more: the same ones with values of others. A copy has the hash of its original in
"copy_of", and an evaluation refuses a model that was trained on a copy of one of its documents. The corpus that comes
with the repository is generated, the same for the same seed (a second on a CPU):

    python idp_prepare.py --synthesize 600 --src data/idp_corpus.jsonl --schema data/idp_schema.json --outdir data

A corpus row is {"document", "gold"[, "group"]}. The group owns the template; without one it is the gold's company.
No group is on both sides of the split, and no held-out row is written. eval_idp.py reaches the same split from the
same file, seed and fraction.
"""

import argparse
import random
from collections import Counter
from pathlib import Path

from common import SEED, dev_split, group_hash, holdout, row_hash
from distill.files import UserError, between, cli, read_json, read_rows, write_jsonl
from distill.tasks.augment import swap_document_values
from distill.tasks.idp_corpus import read_corpus, rejected_answer
from distill.tasks.idp_documents import idp_prompt
from distill.tasks.idp_schema import check_schema, compact, in_schema_order, validator
from distill.tasks.idp_synthetic import synthesize


def main(args):
    schema = read_json(args.schema)
    check_schema(schema)
    if args.synthesize:
        write_jsonl(args.src, synthesize(args.synthesize, args.seed))
    rows = read_corpus(args.src, schema, args.group_field)
    answers = [row["gold"] for row in rows]
    if args.teacher:
        taught = read_rows(args.teacher, {"line": int, "output": (dict, list)})
        if [r["line"] for r in taught] != list(range(1, len(rows) + 1)):
            raise UserError(f"{args.teacher}: expected one result a row of {args.src}, as infer_idp.py writes them")
        answers = [r["output"] for r in taught]
    judge, rng = validator(schema), random.Random(args.seed)
    train, held = holdout([{**r, "teacher": a} for r, a in zip(rows, answers, strict=True)], args.seed, args.val_frac)
    if not train:
        raise UserError(f"{args.src}: all {len(rows)} rows are held out; expected more groups or a smaller --val_frac")
    train = [{**row, "group": group_hash(row["group"])} for row in train]
    own, _ = dev_split(train, args.seed)  # the trainers' development rows stay as they are and lend no value
    own = [{**row, "copy_of": row_hash(idp_prompt(schema, row["document"]))} for row in own]
    copies = swap_document_values(own, copies=args.copies, rng=rng)
    # a teacher answered the documents as they were
    copies = [{**row, "teacher": None if args.teacher else row["gold"]} for row in copies]
    sft, kd, dpo, made = [], [], [], Counter()
    for row in train + copies:
        prompt = idp_prompt(schema, row["document"])
        source = {"group": row["group"]} | ({"copy_of": row["copy_of"]} if "copy_of" in row else {})
        gold = compact(in_schema_order(row["gold"], schema))
        sft.append({"input": prompt, "output": gold, **source})
        if row["teacher"] is not None:
            teacher = compact(in_schema_order(row["teacher"], schema))
            kd.append({"input": prompt, "teacher_output": teacher, **source})
        wrong = rejected_answer(row, judge, rng)
        made[wrong[0] if wrong else "none possible: no DPO row"] += 1
        if wrong:
            rejected = compact(in_schema_order(wrong[1], schema))
            dpo.append({"prompt": prompt, "chosen": gold, "rejected": rejected, **source})
    for name, out in (("sft", sft), ("kd", kd), ("dpo", dpo)):
        write_jsonl(args.outdir / f"idp_{name}.jsonl", out)
        print(f"{args.outdir}/idp_{name}.jsonl: {len(out)} rows")
    print(f"{len(train)} training documents and {len(copies)} copies with exchanged values")
    print(f"{len(held)} documents held out, {len({r['group'] for r in held})} groups of these")
    print("rejected answers:", ", ".join(f"{k} {n}" for k, n in made.most_common()))
    if not args.teacher:
        print("KD rows teach the gold itself; --teacher takes a larger model's answers from infer_idp.py")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--src", required=True, type=Path, help='corpus: JSONL rows {"document", "gold"[, "group"]}')
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
    p.add_argument("--seed", type=int, default=SEED, help=f"of split, generation and mistakes (default {SEED})")
    cli(main, p)
