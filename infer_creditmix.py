"""Classify with a label model: one row from the command line, or thousands from a file.

    python infer_creditmix.py --model_dir runs/smollm2_sft --features "Age: 23.0, Occupation: Scientist, ..."
    python infer_creditmix.py --model_dir runs/smollm2_sft --input rows.jsonl --output out.jsonl
    generate_rows | python infer_creditmix.py --model_dir runs/smollm2_sft --input - --output -

Input rows are CSV, JSON or JSONL with the task's text column; where its task file names none, {"question": text, ...}.
Each output row repeats its input row, with its id and whatever else it holds, and adds the answer.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from common import Calibration, LabelScorer, Task, answers, load_model
from distill.files import ROOT, UserError, atomic_write, cli
from distill.tasks.label_rows import read_texts

TASK = ROOT / "data" / "creditmix_task.json"


def main(args):
    if (args.features is None) == (args.input is None) or bool(args.input) != bool(args.output):
        raise UserError("expected either --features TEXT, or --input FILE with --output FILE")
    task = Task.of(args.model_dir, args.task or TASK)
    if args.task:
        task = replace(task, columns=Task.load(args.task).columns)
    rows, texts = read_texts(args.input, task) if args.input else ([{}], [features_text(args.features)])
    calibration = Calibration.load(args.model_dir, task).for_prior(args.class_prior, task)
    found = classify(args.model_dir, task, calibration, texts, args.precision)
    if args.features is not None:
        print(json.dumps(found[0], indent=1, ensure_ascii=False))
        return
    lines = [json.dumps({**row, **answer}, ensure_ascii=False) + "\n" for row, answer in zip(rows, found, strict=True)]
    if str(args.output) == "-":
        sys.stdout.writelines(lines)
        return
    with atomic_write(args.output) as f:
        f.writelines(lines)
    print(f"{len(rows)} rows in {args.output}")


def features_text(text: str) -> str:
    """The text of --features. Error: UserError where it is empty."""
    if not text.strip():
        raise UserError("--features: the text is empty")
    return text


def classify(model_dir: str, task: Task, calibration: Calibration, texts: list[str], precision: str) -> list[dict]:
    """The answer to each text: prediction, scores and probabilities."""
    model, tokenizer = load_model(model_dir, precision)
    if not calibration.fitted:
        print(f"{model_dir}: no calibration.json: null calibration, probabilities are not fitted", file=sys.stderr)
    scorer = LabelScorer(model, tokenizer, task.labels, task.null_prompts())
    raw = scorer.score([task.prompt(text) for text in texts], progress=len(texts) > 1)
    return answers(task, raw, scorer.prior(task), calibration, model_dir)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model_dir", required=True, help="adapter folder, model folder, hub id or smollm2-135m")
    p.add_argument("--features", help="the features text of one row; the answer is printed as JSON")
    p.add_argument("--input", type=Path, help="CSV, JSON or JSONL file of rows with the text; - for standard input")
    p.add_argument("--output", type=Path, help="JSONL file of the answers, written whole at the end; - to print")
    p.add_argument("--task", type=Path, help="columns of the rows, and the task of a model without task.json")
    p.add_argument(
        "--class_prior", metavar="natural|balanced|JSON|FILE", help="class mix to answer for; default: that of training"
    )
    p.add_argument("--precision", choices=["auto", "nf4", "bf16", "fp32"], default="auto", help="of the base model")
    cli(main, p)
