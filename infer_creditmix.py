"""Classify with a label model: one row from the command line, or thousands from a file.

    python infer_creditmix.py --model_dir runs/smollm2_sft --features "Age: 23.0, Occupation: Scientist, ..."
    python infer_creditmix.py --model_dir runs/smollm2_sft --input rows.jsonl --output out.jsonl

Input rows are {"question": features text, ...}; each output row repeats its input row and adds the answer.
"""

import argparse
import json
import sys
from pathlib import Path

from common import Calibration, LabelScorer, Task, answers, load_model
from distill.files import UserError, atomic_write, check_row, cli, read_rows


def main(args):
    if bool(args.features is None) == bool(args.input is None) or bool(args.input) != bool(args.output):
        raise UserError("expected either --features TEXT, or --input FILE with --output FILE")
    if args.input:
        rows = read_rows(args.input, {"question": str})
    elif args.features.strip():
        rows = [{"question": args.features}]
        check_row("--features", rows[0], {"question": str}, {})
    else:
        raise UserError("--features: the text is empty")
    task = Task.of(args.model_dir, args.task)
    model, tokenizer = load_model(args.model_dir, args.precision)
    scorer = LabelScorer(model, tokenizer, task.labels, task.null_prompts())
    calibration = Calibration.load(args.model_dir, task)
    if not calibration.fitted:
        print(f"{args.model_dir}: no calibration.json: null calibration, probabilities are not fitted", file=sys.stderr)
    raw = scorer.score([task.prompt(r["question"]) for r in rows], progress=bool(args.input))
    found = answers(task, raw, scorer.prior(task), calibration, str(args.model_dir))
    if args.input:
        with atomic_write(args.output) as f:
            for row, answer in zip(rows, found, strict=True):
                f.write(json.dumps({**row, **answer}, ensure_ascii=False) + "\n")
        print(f"{len(rows)} rows in {args.output}")
    else:
        print(json.dumps(found[0], indent=1, ensure_ascii=False))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model_dir", required=True, help="adapter folder, model folder, hub id or smollm2-135m")
    p.add_argument("--features", help="the features text of one row; the answer is printed as JSON")
    p.add_argument("--input", type=Path, help="JSON or JSONL file of rows with a field question")
    p.add_argument("--output", type=Path, help="JSONL file of the answers, written whole at the end")
    p.add_argument("--task", type=Path, default=Path("data/creditmix_task.json"), help="for a model without task.json")
    p.add_argument("--precision", choices=["auto", "nf4", "bf16", "fp32"], default="auto", help="of the base model")
    cli(main, p)
