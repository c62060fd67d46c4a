"""Python code from a request: direct or plan first, checked against tests in the sandbox where there are some.

    python infer_codegen.py --model_dir runs/codegen_sft --prompt "Write a function that sorts a list." > sort.py
    python infer_codegen.py --model_dir runs/codegen_sft --prompt "Write top(words, k): the k most frequent words." \
        --tests test_top.py --n 5 --plan_then_code
    python infer_codegen.py --model_dir smollm2-135m --prompt "Write add(a, b)." --max_new_tokens 40       # CPU
    python infer_codegen.py --model_dir runs/codegen_sft --input requests.jsonl --output code.jsonl --n 10  # batches

Only code goes to standard output, the rest (plan, sandbox, verdicts) to standard error; --json shows whole replies.
Exit code 1: no reply holds code, or --tests were given and no sample passes them.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from common import load_model
from distill.files import UserError, cli, read_text, write_jsonl
from distill.tasks.codegen_reply import Screen, only_code, streamer
from distill.tasks.codegen_samples import add_sampling_arguments, check_sampling, sample, sample_to_file
from distill.tasks.codegen_sandbox import describe_isolation, run_many
from distill.tasks.codegen_tasks import parse_tests, program, read_tasks


def main(args):
    check_arguments(args)
    tests = parse_tests(read_text(args.tests), args.tests) if args.tests else None
    tasks = read_tasks(args.input) if args.input else [{"prompt": args.prompt}]
    for task in tasks:
        if task.get("tests"):
            parse_tests(task["tests"], f"{args.input}: task {task['task_id']}")
    if tests is not None or any(t.get("tests") for t in tasks):
        print(describe_isolation(), file=sys.stderr)
    model, tokenizer = load_model(args.model_dir)
    if args.input:
        return write_batch(model, tokenizer, tasks, args)
    return answer(model, tokenizer, args, tests)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks and prompts: prepare, infer and eval build them here


# ---------------------------------------------------------------------------------------------------------------------
# Generation


# ---------------------------------------------------------------------------------------------------------------------
# What the user gets


def check_arguments(args):
    """Errors: UserError for what cannot be meant, before a model is loaded."""
    if (args.prompt is None) == (args.input is None) or (args.input is None) != (args.output is None):
        raise UserError("expected --prompt TEXT, or --input FILE with --output FILE")
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty; expected a request")
    if args.input and args.tests:
        raise UserError("--tests belongs to --prompt; expected a field 'tests' in the rows of --input")
    check_sampling(args)


def answer(model, tokenizer, args, tests):
    """Samples for one prompt: all of them, or with tests the first that passes; exit code 1 when none does."""
    import torch

    torch.manual_seed(args.seed)
    stream = sys.stdout.isatty() and args.n == 1 and tests is None and not args.json
    screen = Screen()
    streamers = (streamer(tokenizer, screen.plan), streamer(tokenizer, screen.reply)) if stream else (None, None)
    kinds, empty = Counter(), 0
    for start in range(0, args.n, args.batch_size):
        rows = sample(model, tokenizer, [args.prompt] * min(args.batch_size, args.n - start), args, streamers)
        verdicts = run_many([(row["code"], tests) for row in rows]) if tests is not None else [None] * len(rows)
        for k, (row, verdict) in enumerate(zip(rows, verdicts, strict=True), start + 1):
            if verdict:
                kinds[verdict["kind"]] += 1
                print(f"sample {k}: {verdict['kind']} {verdict['detail']}".strip(), file=sys.stderr)
                if verdict["kind"] == "passed":
                    return show(row, verdict, args, k)
                continue
            row["code"] = only_code(row["reply"])
            empty += not row["code"].strip()
            if not stream:
                show(row, verdict, args, k)
            elif not screen.shown and row["code"]:
                print(row["code"])
    if tests is not None:
        print(f"no sample passes the tests: {dict(kinds)}", file=sys.stderr)
        sys.exit(1)
    if empty:
        told = "; expected a larger --max_new_tokens or another --seed (--json shows the reply)"
        print(f"no code in {empty} of {args.n} replies{told}", file=sys.stderr)
    if empty == args.n:
        sys.exit(1)


def show(row, verdict, args, k):
    """One sample: code (or JSON) to standard output, the plan beside it to standard error."""
    if args.json:
        fields = {name: row[name] for name in ("plan", "code", "reply", "tokens", "seconds")}
        print(json.dumps({"prompt": args.prompt, **fields, **({"verdict": verdict} if verdict else {})}))
        return
    if row["plan"]:
        print(f"plan:\n{row['plan']}\n", file=sys.stderr)
    if row["code"]:
        print(f"# sample {k} of {args.n}\n" * (args.n > 1 and verdict is None) + row["code"], flush=True)


def write_batch(model, tokenizer, tasks, args):
    """Samples for the rows of --input, checked where a row has tests, to --output (JSONL, by rename)."""
    part = args.output.with_name(args.output.name + ".part")
    prompts = [t["prompt"] for t in tasks]
    rows = sample_to_file(model, tokenizer, args.model_dir, prompts, part, args, "samples")
    checked = [row for row in rows if "code" in row and tasks[row["index"]].get("tests")]
    verdicts = run_many([(program(tasks[r["index"]], r["code"]), tasks[r["index"]]["tests"]) for r in checked])
    for row, verdict in zip(checked, verdicts, strict=True):
        row["verdict"] = verdict
    for row in rows:
        task = tasks[row.pop("index")]
        row |= {"task_id": task["task_id"], "prompt": task["prompt"]}
        row.pop("reply", None)
    write_jsonl(args.output, rows)
    part.unlink()
    errors = sum("error" in row for row in rows)
    print(f"{len(rows)} samples for {len(tasks)} prompts in {args.output}; over the context: {errors}", file=sys.stderr)
    if checked:
        print(f"verdicts: {dict(Counter(row['verdict']['kind'] for row in checked))}", file=sys.stderr)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model_dir", required=True, help="adapter folder, model folder, hub id or smollm2-135m")
    p.add_argument("--prompt", help="the request")
    p.add_argument(
        "--plan_then_code", action="store_true", help="a plan first, then code that follows it; twice the calls"
    )
    p.add_argument(
        "--tests", type=Path, help="file of asserts; prints the first sample that passes them in the sandbox"
    )
    p.add_argument("--json", action="store_true", help="print plan, code, reply, tokens and seconds, a line a sample")
    p.add_argument("--input", type=Path, help="JSONL of prompts (and tests), instead of --prompt")
    p.add_argument("--output", type=Path, help="JSONL of samples for --input; a stopped run goes on where it was")
    add_sampling_arguments(p)
    cli(main, p)
